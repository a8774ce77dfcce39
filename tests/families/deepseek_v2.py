"""DeepSeek V2, V3 and Kimi K2: transformers' own classes."""

from functools import partial
from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import causal, predictor, random_model, split_experts, write

V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 72,
    "kv_lora_rank": 20,
    "max_position_embeddings": 256,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 24,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 0.01,
    "rope_scaling": {
        "beta_fast": 2,
        "beta_slow": 1.25,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 64,
        "type": "yarn",
    },
    "rope_theta": 100,  # so that both betas cut the four frequencies
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "v_head_dim": 16,
    "vocab_size": 131,
}

KIMI: dict[str, Any] = V3 | {
    "model_type": "kimi_k2",
    "n_group": 1,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**V3["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
}
PLAIN: dict[str, Any] = V3 | {
    "n_group": 1,
    "norm_topk_prob": False,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rope_interleave": False,
    "rope_scaling": None,
    "rope_theta": 20000.0,
    "topk_group": 1,
}
V2: dict[str, Any] = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
}
V2_LITE: dict[str, Any] = V2 | {
    "n_group": 1,
    "q_lora_rank": None,
    "rope_scaling": {**V2["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}


def save(folder: Path, config: dict[str, Any]) -> Oracle:
    from transformers import (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
    )

    second = config["model_type"] == "deepseek_v2"
    kinds = DeepseekV2Config, DeepseekV2ForCausalLM
    if not second:
        kinds = DeepseekV3Config, DeepseekV3ForCausalLM
    changes = {} if second else {"model_type": "deepseek_v3"}
    model = random_model(kinds[1], kinds[0].from_dict(config | changes))
    tensors = split_experts(model.state_dict())
    if config["num_nextn_predict_layers"]:
        tensors |= predictor(tensors, config["num_hidden_layers"])
    write(folder, config, tensors)
    return causal(model)


CONFIGS = {
    "V3": V3,
    "Kimi K2": KIMI,
    "V3 of one query projection, not renormalised, whose halves of a head turn": PLAIN,
    "V2": V2,
    "V2-Lite": V2_LITE,
}
CASES = tuple(
    Case(
        name=f"deepseek_v2: {name}",
        family="deepseek_v2",
        oracle=f"transformers {config['architectures'][0]}",
        save=partial(save, config=config),
    )
    for name, config in CONFIGS.items()
)
