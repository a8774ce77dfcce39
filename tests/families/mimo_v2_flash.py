"""MiMo-V2-Flash: transformers' own class."""

from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import causal, drawn, random_model, split_experts, write

CONFIG: dict[str, Any] = {
    "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": True,
    "architectures": ["MiMoV2FlashForCausalLM"],
    "attention_bias": False,
    "attention_chunk_size": 8,
    "attention_dropout": 0.0,
    "attention_value_scale": 0.707,
    "head_dim": 24,
    "hidden_act": "silu",
    "hidden_size": 48,
    "hybrid_block_size": None,
    "hybrid_layer_pattern": [0, 1, 1, 0],
    "intermediate_size": 72,
    "layernorm_epsilon": 0.01,
    "max_position_embeddings": 256,
    "model_type": "mimo_v2_flash",
    "moe_intermediate_size": 24,
    "moe_layer_freq": [0, 1, 1, 1],
    "n_group": 1,
    "n_routed_experts": 24,
    "n_shared_experts": None,
    "norm_topk_prob": True,
    "num_attention_heads": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.334,
    "rope_theta": 5000000,
    "routed_scaling_factor": None,
    "scoring_func": "sigmoid",
    "sliding_window": 8,
    "sliding_window_size": 8,  # keys beside the query's own: it sees 9
    "swa_head_dim": 24,
    "swa_num_attention_heads": 24,
    "swa_num_key_value_heads": 4,
    "swa_rope_theta": 10000,
    "swa_v_head_dim": 16,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "v_head_dim": 16,
    "vocab_size": 131,
}


def save(folder: Path) -> Oracle:
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

    kinds = ("full_attention", "sliding_attention")
    config = MiMoV2FlashConfig.from_dict(
        CONFIG
        | {
            "rms_norm_eps": CONFIG["layernorm_epsilon"],
            "layer_types": [kinds[slides] for slides in CONFIG["hybrid_layer_pattern"]],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "rope_parameters": {
                kind: {
                    "rope_type": "default",
                    "rope_theta": theta,
                    "partial_rotary_factor": CONFIG["partial_rotary_factor"],
                }
                for kind, theta in zip(kinds, (5e6, 1e4), strict=True)
            },
        }
    )
    model = random_model(MiMoV2FlashForCausalLM, config)
    tensors = {
        name.replace(".self_attn.sinks", ".self_attn.attention_sink_bias"): tensor
        for name, tensor in split_experts(model.state_dict()).items()
    }
    behind = {"model.mtp.layers.0.eh_proj.weight": (48, 96)}
    write(folder, CONFIG, tensors | drawn(behind, seed=1))
    return causal(model)


CASES = (
    Case(
        name="mimo_v2_flash",
        family="mimo_v2_flash",
        oracle="transformers MiMoV2FlashForCausalLM",
        save=save,
    ),
)
