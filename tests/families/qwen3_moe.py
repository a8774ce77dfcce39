"""Qwen3-MoE: transformers' own class; a dense layer between those with experts."""

from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import causal, random_model, split_experts, write

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 72,
    "max_position_embeddings": 256,
    "max_window_layers": 3,
    "mlp_only_layers": [1],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_attention_heads": 24,
    "num_experts": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 0.01,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_sliding_window": False,
    "vocab_size": 131,
}


def save(folder: Path) -> Oracle:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = random_model(Qwen3MoeForCausalLM, Qwen3MoeConfig.from_dict(CONFIG))
    write(folder, CONFIG, split_experts(model.state_dict()))
    return causal(model)


CASES = (
    Case(
        name="qwen3_moe",
        family="qwen3_moe",
        oracle="transformers Qwen3MoeForCausalLM",
        save=save,
    ),
)
