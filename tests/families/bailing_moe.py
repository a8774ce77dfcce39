"""Ling and Ring 1.x, 2.0: transformers' Qwen2-MoE and GLM-4-MoE under Ling's names.

Ling 1.x is Qwen2-MoE whose shared expert has no gate: a gate weight of zero halves the shared
output, so the oracle's down projection is twice the checkpoint's. Ling 2.0 is GLM-4-MoE with QK
norm.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.case import Case, Oracle
from families.make import causal, drawn, random_model, split_experts, write

V1: dict[str, Any] = {
    "architectures": ["BailingMoeForCausalLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "eos_token_id": 2,
    "first_k_dense_replace": 0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 72,
    "max_position_embeddings": 256,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 24,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 24,
    "num_experts": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "num_shared_experts": 2,
    "output_dropout": 0.0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_qkv_bias": False,
    "vocab_size": 131,
}

V2: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 72,
    "max_position_embeddings": 256,
    "model_type": "bailing_moe_v2",
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 48,
    "n_group": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 24,
    "num_experts": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 6,
    "num_nextn_predict_layers": 1,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "vocab_size": 131,
}


def save_v1(folder: Path, **changes: Any) -> Oracle:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = V1 | changes
    width = config["moe_intermediate_size"] * config["num_shared_experts"]
    model = random_model(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **shared_keys(config),
            num_experts=config["num_experts"],
            shared_expert_intermediate_size=width,
            qkv_bias=config["use_qkv_bias"],
        ),
    )
    state = model.state_dict()
    write(folder, config, published(state))
    for name, tensor in state.items():
        if name.endswith("shared_expert_gate.weight"):
            tensor.zero_()
        elif name.endswith("shared_expert.down_proj.weight"):
            tensor *= 2
    return causal(model)


def save_v2(folder: Path, **changes: Any) -> Oracle:
    config = V2 | changes
    model = glm4_moe(config)
    write(folder, config, published(model.state_dict()) | mtp_tensors(config))
    return causal(model)


def glm4_moe(config: dict[str, Any]) -> Any:
    """transformers' GLM-4-MoE with a Ling 2.0 config and random weights."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    shared = config.get("moe_shared_expert_intermediate_size") or config["moe_intermediate_size"]
    return random_model(
        Glm4MoeForCausalLM,
        Glm4MoeConfig(
            **shared_keys(config),
            n_routed_experts=config["num_experts"],
            n_shared_experts=(
                shared * config["num_shared_experts"] // config["moe_intermediate_size"]
            ),
            n_group=config.get("n_group", 1),
            topk_group=config.get("topk_group", 1),
            first_k_dense_replace=config["first_k_dense_replace"],
            routed_scaling_factor=config["routed_scaling_factor"],
            partial_rotary_factor=config.get("partial_rotary_factor", 1.0),
            attention_bias=False,
            use_qk_norm=True,
        ),
    )


def shared_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that Ling and transformers spell alike."""
    keys = (
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_attention_heads",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "vocab_size",
    )
    return {key: config[key] for key in keys}


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under Ling's names."""
    renames = (
        ("model.embed_tokens.", "model.word_embeddings."),
        (".self_attn.o_proj.", ".attention.dense."),
        (".self_attn.q_norm.", ".attention.query_layernorm."),
        (".self_attn.k_norm.", ".attention.key_layernorm."),
        (".mlp.gate.e_score_correction_bias", ".mlp.gate.expert_bias"),
        (".mlp.shared_expert.", ".mlp.shared_experts."),
    )
    tensors = {}
    for name, tensor in split_experts(state).items():
        at, attention, projection = name.partition(".self_attn.")
        if name.endswith("shared_expert_gate.weight") or projection.startswith(
            ("k_proj.", "v_proj.")
        ):
            continue
        if projection.startswith("q_proj."):
            kind = projection.removeprefix("q_proj.")
            tensors[f"{at}.attention.query_key_value.{kind}"] = torch.cat(
                [state[f"{at}{attention}{x}_proj.{kind}"] for x in "qkv"]
            )
            continue
        for old, new in renames:
            name = name.replace(old, new)
        tensors[name] = tensor
    return tensors


def mtp_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Some of what releases carry of a layer that predicts further tokens."""
    hidden, at = config["hidden_size"], f"model.layers.{config['num_hidden_layers']}"
    shapes = {
        f"{at}.eh_proj.weight": (hidden, 2 * hidden),
        f"{at}.enorm.weight": (hidden,),
        f"{at}.hnorm.weight": (hidden,),
        f"{at}.attention.dense.weight": (
            hidden,
            config["num_attention_heads"] * config["head_dim"],
        ),
        f"{at}.mlp.gate.expert_bias": (config["num_experts"],),
        f"{at}.final_layernorm.weight": (hidden,),
    }
    return drawn(shapes, seed=1)


CASES = (
    Case(
        name="bailing_moe 1",
        family="bailing_moe",
        oracle="transformers Qwen2MoeForCausalLM, renamed",
        save=save_v1,
    ),
    Case(
        name="bailing_moe 1 with QKV bias and 2 KV heads",
        family="bailing_moe",
        oracle="transformers Qwen2MoeForCausalLM, renamed",
        save=partial(save_v1, use_qkv_bias=True, num_key_value_heads=2),
    ),
    Case(
        name="bailing_moe 2",
        family="bailing_moe",
        oracle="transformers Glm4MoeForCausalLM, renamed",
        save=save_v2,
    ),
    Case(
        name="bailing_moe 2 with 2 KV heads",
        family="bailing_moe",
        oracle="transformers Glm4MoeForCausalLM, renamed",
        save=partial(save_v2, num_key_value_heads=2, norm_topk_prob=False),
    ),
)
