"""SDAR: transformers' Qwen3-MoE under a block-causal mask.

`block_size` and `mask_token_id` stand in for 4 and 151669, which SGLang knows by architecture.
"""

from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import block_causal, random_model, split_experts, write

BLOCK, MASK_ID = 4, 130

CONFIG: dict[str, Any] = {
    "architectures": ["SDARMoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": BLOCK,
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 72,
    "mask_token_id": MASK_ID,
    "max_position_embeddings": 256,
    "max_window_layers": 3,
    "mlp_only_layers": [],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_attention_heads": 24,
    "num_experts": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_sliding_window": False,
    "vocab_size": 131,
}


def save(folder: Path) -> Oracle:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig.from_dict(CONFIG | {"model_type": "qwen3_moe"})
    model = random_model(Qwen3MoeForCausalLM, config)
    write(folder, CONFIG, split_experts(model.state_dict()))
    return block_causal(model, BLOCK)


CASES = (
    Case(
        name="sdar_moe",
        family="sdar_moe",
        oracle="transformers Qwen3MoeForCausalLM, block-causal mask",
        save=save,
    ),
)
