"""Sarvam: GLM-4-MoE under Ling's names (30b); DeepSeek-V3 (105b).

The 105b config names no expert groups, but its released code falls back to groups of eight experts,
of which two are kept.
"""

from pathlib import Path
from typing import Any

from families.bailing_moe import V2, glm4_moe, published
from families.case import Case, Oracle
from families.make import causal, random_model, split_experts, write

LING_ONLY = {
    "moe_shared_expert_intermediate_size",
    "num_nextn_predict_layers",
    "partial_rotary_factor",
}

GQA: dict[str, Any] = {key: value for key, value in V2.items() if key not in LING_ONLY} | {
    "architectures": ["SarvamMoEForCausalLM"],
    "max_window_layers": 3,
    "model_type": "sarvam_moe",
    "n_group": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rope_theta": 8000000.0,
    "topk_group": 1,
}

MLA: dict[str, Any] = {
    "architectures": ["SarvamMLAForCausalLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "head_dim": 20,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 72,
    "kv_lora_rank": 12,
    "max_position_embeddings": 256,
    "model_type": "sarvam_mla",
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "num_attention_heads": 24,
    "num_experts": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "pad_token_id": 0,
    "q_head_dim": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "type": "deepseek_yarn",
    },
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_qk_norm": True,
    "v_head_dim": 16,
    "vocab_size": 131,
}


def save_gqa(folder: Path) -> Oracle:
    model = glm4_moe(GQA)
    write(folder, GQA, published(model.state_dict()))
    return causal(model)


def save_mla(folder: Path) -> Oracle:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **{
            key: MLA[key]
            for key in (
                "first_k_dense_replace",
                "hidden_size",
                "intermediate_size",
                "kv_lora_rank",
                "max_position_embeddings",
                "moe_intermediate_size",
                "num_attention_heads",
                "num_experts_per_tok",
                "num_hidden_layers",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "rms_norm_eps",
                "routed_scaling_factor",
                "v_head_dim",
                "vocab_size",
            )
        },
        num_key_value_heads=MLA["num_attention_heads"],
        q_lora_rank=None,
        n_routed_experts=MLA["num_experts"],
        n_shared_experts=MLA["num_shared_experts"],
        n_group=MLA["num_experts"] // 8,
        topk_group=2,
        norm_topk_prob=True,
        rope_parameters=MLA["rope_scaling"]
        | {"rope_type": "yarn", "rope_theta": MLA["rope_theta"]},
    )
    model = random_model(DeepseekV3ForCausalLM, config)
    write(folder, MLA, split_experts(model.state_dict()))
    return causal(model)


CASES = (
    Case(
        name="sarvam_moe",
        family="sarvam_moe",
        oracle="transformers Glm4MoeForCausalLM, renamed",
        save=save_gqa,
    ),
    Case(
        name="sarvam_moe with latent attention",
        family="sarvam_moe",
        oracle="transformers DeepseekV3ForCausalLM",
        save=save_mla,
    ),
)
