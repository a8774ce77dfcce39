"""Hunyuan 3: transformers' own class."""

from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import causal, predictor, random_model, split_experts, write

CONFIG: dict[str, Any] = {
    "architectures": ["HYV3ForCausalLM"],
    "dtype": "float32",
    "enable_attention_fp32_softmax": False,
    "enable_lm_head_fp32": True,
    "enable_moe_fp32_combine": False,
    "expert_hidden_dim": 24,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 72,
    "max_position_embeddings": 256,
    "model_type": "hy_v3",
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "moe_router_use_sigmoid": True,
    "num_attention_heads": 24,
    "num_experts": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "num_shared_experts": 1,
    "qk_norm": True,
    "rms_norm_eps": 0.01,
    "rope_parameters": {"rope_theta": 11158840.0, "rope_type": "default"},
    "route_norm": True,
    "router_scaling_factor": 2.826,
    "tie_word_embeddings": False,
    "vocab_size": 131,
}


def save(folder: Path) -> Oracle:
    from transformers import HYV3Config, HYV3ForCausalLM

    model = random_model(HYV3ForCausalLM, HYV3Config.from_dict(CONFIG))
    tensors = {}
    for name, tensor in split_experts(model.state_dict()).items():
        for old, new in (
            (".mlp.gate.weight", ".mlp.router.gate.weight"),
            (".mlp.gate.e_score_correction_bias", ".mlp.expert_bias"),
            (".mlp.e_score_correction_bias", ".mlp.expert_bias"),
            (".mlp.shared_experts.", ".mlp.shared_mlp."),
        ):
            name = name.replace(old, new)
        tensors[name] = tensor
    write(folder, CONFIG, tensors | predictor(tensors, CONFIG["num_hidden_layers"]))
    return causal(model)


CASES = (
    Case(
        name="hunyuan_v3",
        family="hunyuan_v3",
        oracle="transformers HYV3ForCausalLM",
        save=save,
    ),
)
