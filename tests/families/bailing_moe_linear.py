"""Ring-linear 2.0, Ling and Ring 2.5: plain torch, `reference_bailing_linear`.

The hidden size is heads * head size, as in all releases: their code takes a linear layer's head
size from the one or the other. Layers of both: linear (the first one dense) and softmax, twice; one
more softmax layer, being an incomplete group.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families import reference_bailing_linear
from families.bailing_moe import mtp_tensors
from families.case import Case, Oracle
from families.make import drawn, write

GQA: dict[str, Any] = {
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "group_norm_size": 12,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 72,
    "layer_group_size": 2,
    "linear_silu": False,
    "max_position_embeddings": 256,
    "model_type": "bailing_moe_linear",
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 48,
    "n_group": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 24,
    "num_experts": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "vocab_size": 131,
}

MLA: dict[str, Any] = GQA | {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "group_norm_size": 24,
    "kv_lora_rank": 20,
    "model_type": "bailing_hybrid",
    "num_key_value_heads": 24,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 28,
    "qk_head_dim": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "rope_interleave": True,
    "v_head_dim": 16,
}


def save(folder: Path, config: dict[str, Any]) -> Oracle:
    weights = drawn(shapes(config), seed=0, spread=0.08)
    extra = mtp_tensors(config) if config["num_nextn_predict_layers"] else {}
    write(folder, config, weights | extra)

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        return reference_bailing_linear.logits(config, weights, ids)

    return logits


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published checkpoint."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    sizes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        dense = layer < config["first_k_dense_replace"]
        sizes |= {
            f"model.layers.{layer}.{name}": size
            for name, size in (
                attention(config, layer)
                | (swiglu("mlp", hidden, config["intermediate_size"]) if dense else mixture(config))
                | {
                    "input_layernorm.weight": (hidden,),
                    "post_attention_layernorm.weight": (hidden,),
                }
            ).items()
        }
    return sizes


def attention(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, heads, d = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    softmax = reference_bailing_linear.is_softmax(config, layer)
    if softmax and "kv_lora_rank" in config:
        q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
        nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        return {
            "attention.q_a_proj.weight": (q_rank, hidden),
            "attention.q_a_layernorm.weight": (q_rank,),
            "attention.q_b_proj.weight": (heads * (nope + rope), q_rank),
            "attention.kv_a_proj_with_mqa.weight": (kv_rank + rope, hidden),
            "attention.kv_a_layernorm.weight": (kv_rank,),
            "attention.kv_b_proj.weight": (heads * (nope + config["v_head_dim"]), kv_rank),
            "attention.dense.weight": (hidden, heads * config["v_head_dim"]),
        }
    kv_heads = config["num_key_value_heads"] if softmax else heads
    sizes: dict[str, tuple[int, ...]] = {
        "attention.query_key_value.weight": ((heads + 2 * kv_heads) * d, hidden),
        "attention.query_layernorm.weight": (d,),
        "attention.key_layernorm.weight": (d,),
        "attention.dense.weight": (hidden, heads * d),
    }
    if not softmax:
        sizes["attention.g_proj.weight"] = (heads * d, hidden)
        sizes["attention.g_norm.weight"] = (heads * d,)
    return sizes


def mixture(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, experts = config["hidden_size"], config["num_experts"]
    sizes: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (experts, hidden),
        "mlp.gate.expert_bias": (experts,),
    }
    for expert in range(experts):
        sizes |= swiglu(f"mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
    return sizes | swiglu(
        "mlp.shared_experts", hidden, config["moe_shared_expert_intermediate_size"]
    )


def swiglu(name: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (width, hidden),
        f"{name}.up_proj.weight": (width, hidden),
        f"{name}.down_proj.weight": (hidden, width),
    }


CASES = (
    Case(
        name="bailing_moe_linear",
        family="bailing_moe_linear",
        oracle="plain torch, token by token",
        save=partial(save, config=GQA),
    ),
    Case(
        name="bailing_moe_linear with latent attention",
        family="bailing_moe_linear",
        oracle="plain torch, token by token",
        save=partial(save, config=MLA),
    ),
)
