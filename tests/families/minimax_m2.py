"""MiniMax-M2: transformers' own class."""

from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import causal, random_model, split_experts, write

CONFIG: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attn_type_list": [1, 1, 1],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 24,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "rms_norm_eps": 0.01,
    "rope_theta": 5000000,
    "rotary_dim": 8,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 131,
}


def save(folder: Path) -> Oracle:
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    config = MiniMaxM2Config.from_dict(CONFIG | {"rope_parameters": rope})
    model = random_model(MiniMaxM2ForCausalLM, config)
    tensors = {}
    for name, tensor in split_experts(model.state_dict(), "w1", "w3", "w2").items():
        name = name.replace(".mlp.gate.e_score", ".mlp.e_score")
        tensors[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
    write(folder, CONFIG, tensors)
    return causal(model)


CASES = (
    Case(
        name="minimax_m2",
        family="minimax_m2",
        oracle="transformers MiniMaxM2ForCausalLM",
        save=save,
    ),
)
