"""K-EXAONE: transformers' own class."""

from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import causal, drawn, random_model, split_experts, write

CONFIG: dict[str, Any] = {
    "architectures": ["ExaoneMoEForCausalLM"],
    "first_last_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 72,
    "is_moe_layer": [False, True, True, False, True],
    "layer_types": [
        "sliding_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ],
    "max_position_embeddings": 256,
    "model_type": "exaone_moe",
    "moe_intermediate_size": 24,
    "n_group": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 24,
    "num_experts": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "rms_norm_eps": 0.01,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "sliding_window": 8,
    "sliding_window_pattern": "LLLG",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "vocab_size": 131,
}


def save(folder: Path) -> Oracle:
    from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

    kinds = ["sparse" if sparse else "dense" for sparse in CONFIG["is_moe_layer"]]
    config = ExaoneMoeConfig.from_dict(CONFIG | {"mlp_layer_types": kinds})
    model = random_model(ExaoneMoeForCausalLM, config)
    tensors = {
        name.replace(".gate.e_score_correction_bias", ".e_score_correction_bias"): tensor
        for name, tensor in split_experts(model.state_dict()).items()
    }
    behind = {"mtp.fc.weight": (48, 96), "mtp.layers.0.input_layernorm.weight": (48,)}
    write(folder, CONFIG, tensors | drawn(behind, seed=1))
    return causal(model)


CASES = (
    Case(
        name="exaone_moe",
        family="exaone_moe",
        oracle="transformers ExaoneMoeForCausalLM",
        save=save,
    ),
)
