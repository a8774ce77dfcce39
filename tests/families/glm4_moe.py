"""GLM-4-MoE: transformers' own class, with and without QK norm, groups and normed weights."""

from functools import partial
from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import causal, predictor, random_model, split_experts, write

CONFIG: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 72,
    "max_position_embeddings": 256,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 24,
    "n_group": 4,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 0.01,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "float32",
    "use_qk_norm": True,
    "vocab_size": 131,
}


def save(folder: Path, **changes: Any) -> Oracle:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = CONFIG | changes
    model = random_model(Glm4MoeForCausalLM, Glm4MoeConfig.from_dict(config))
    tensors = split_experts(model.state_dict())
    write(folder, config, tensors | predictor(tensors, config["num_hidden_layers"]))
    return causal(model)


CASES = (
    Case(
        name="glm4_moe",
        family="glm4_moe",
        oracle="transformers Glm4MoeForCausalLM",
        save=save,
    ),
    Case(
        name="glm4_moe without QK norm",
        family="glm4_moe",
        oracle="transformers Glm4MoeForCausalLM",
        save=partial(
            save,
            use_qk_norm=False,
            n_group=1,
            topk_group=1,
            n_shared_experts=2,
            norm_topk_prob=False,
            num_key_value_heads=2,
        ),
    ),
)
