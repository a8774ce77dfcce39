"""Ring-linear 2.0 and Ling/Ring 2.5, 2.6 in plain torch: one sequence, fp32, token by token.

It computes from the tensors of a checkpoint, under their published names. Sources: the released
`modeling_bailing_moe_linear_v2.py` (Ring-linear 2.0) and `modeling_bailing_moe_v2_5.py` (2.5);
Lightning Attention-2 (arXiv 2401.04658) for the slopes; DeepSeek-V2 (arXiv 2405.04434) for latent
attention; DeepSeek-V3 (arXiv 2412.19437) for the routing. The two releases differ in their softmax
layers only: grouped-query attention in the first, latent attention in the second.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]


def logits(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    """[T] int64 -> [T, vocab] fp32."""
    eps = config["rms_norm_eps"]
    x = weights["model.word_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        w = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        h = rms_norm(x, w["input_layernorm.weight"], eps)
        if not is_softmax(config, layer):
            x = x + lightning(config, w, h, layer)
        elif "kv_lora_rank" in config:
            x = x + latent_attention(config, w, h)
        else:
            x = x + grouped_query_attention(config, w, h)
        h = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        if layer < config["first_k_dense_replace"]:
            x = x + swiglu(w, "mlp", h)
        else:
            x = x + mixture(config, w, h)
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def is_softmax(config: Config, layer: int) -> bool:
    """The last layer of each group, and all layers of an incomplete last group."""
    group, layers = config["layer_group_size"], config["num_hidden_layers"]
    return (layer + 1) % group == 0 or layer >= layers // group * group


def lightning(config: Config, w: Weights, x: Tensor, layer: int) -> Tensor:
    """Linear attention of one layer: x [T, hidden] -> [T, hidden].

    A head's state S [d, d] starts at zero. Each token: S = exp(-slope) * S + k^T v, then
    d^-1/2 * q S. `group_norm_size` is the number of groups of the norm that follows.
    """
    heads, d, eps = config["num_attention_heads"], config["head_dim"], config["rms_norm_eps"]
    qkv = (x @ w["attention.query_key_value.weight"].T).view(-1, 3, heads, d)
    q = rms_norm(qkv[:, 0], w["attention.query_layernorm.weight"], eps)
    k = rms_norm(qkv[:, 1], w["attention.key_layernorm.weight"], eps)
    v = qkv[:, 2]
    q, k = rotate_half_pairs(config, q), rotate_half_pairs(config, k)
    factor = layer_factor(layer, config["num_hidden_layers"])
    decay = torch.tensor([math.exp(-slope * factor) for slope in slopes(heads)]).view(heads, 1, 1)
    state = torch.zeros(heads, d, d)
    outputs = []
    for t in range(len(x)):
        state = decay * state + k[t].unsqueeze(2) * v[t].unsqueeze(1)
        outputs.append((q[t].unsqueeze(1) @ state).view(heads * d) * d**-0.5)
    y = torch.stack(outputs).view(len(x), config["group_norm_size"], -1)
    y = y * (y.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    y = y.view(len(x), heads * d) * w["attention.g_norm.weight"]
    y = y * torch.sigmoid(x @ w["attention.g_proj.weight"].T)
    return y @ w["attention.dense.weight"].T


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes: 2^(-8 h / n) for a power of two; else those of the next lower power, and
    every other one of twice that power."""
    power = 2 ** int(math.log2(heads))
    first = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    second = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return first + second[: heads - power]


def layer_factor(layer: int, layers: int) -> float:
    """How much of its slope a layer uses, as the released code has it: above 1 in layer 0."""
    return 1 - (layer - 1) / (layers - 1) + 1e-5


def grouped_query_attention(config: Config, w: Weights, x: Tensor) -> Tensor:
    heads, kv_heads, d = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    eps = config["rms_norm_eps"]
    qkv = (x @ w["attention.query_key_value.weight"].T).view(len(x), -1, d)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    q = rotate_half_pairs(config, rms_norm(q, w["attention.query_layernorm.weight"], eps))
    k = rotate_half_pairs(config, rms_norm(k, w["attention.key_layernorm.weight"], eps))
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    return causal_softmax(q, k, v) @ w["attention.dense.weight"].T


def latent_attention(config: Config, w: Weights, x: Tensor) -> Tensor:
    """DeepSeek's latent attention, rotary position in neighbouring pairs."""
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    nope, rope, value = (
        config["qk_nope_head_dim"],
        config["qk_rope_head_dim"],
        config["v_head_dim"],
    )
    q = rms_norm(x @ w["attention.q_a_proj.weight"].T, w["attention.q_a_layernorm.weight"], eps)
    q = (q @ w["attention.q_b_proj.weight"].T).view(len(x), heads, nope + rope)
    compressed = x @ w["attention.kv_a_proj_with_mqa.weight"].T
    latent, k_rope = compressed.split([config["kv_lora_rank"], rope], dim=1)
    latent = rms_norm(latent, w["attention.kv_a_layernorm.weight"], eps)
    kv = (latent @ w["attention.kv_b_proj.weight"].T).view(len(x), heads, nope + value)
    q_rope = rotate_neighbours(config, q[..., nope:])
    k_rope = rotate_neighbours(config, k_rope.unsqueeze(1)).expand(-1, heads, -1)
    q = torch.cat([q[..., :nope], q_rope], dim=2)
    k = torch.cat([kv[..., :nope], k_rope], dim=2)
    return causal_softmax(q, k, kv[..., nope:]) @ w["attention.dense.weight"].T


def mixture(config: Config, w: Weights, x: Tensor) -> Tensor:
    """Routed experts, each token by itself, and the shared expert.

    Chosen by sigmoid score + bias within the best groups (a group's score is the sum of its two
    best); weighted by the score alone, over the sum of the chosen, times the factor.
    """
    scores = torch.sigmoid(x @ w["mlp.gate.weight"].T)
    biased = scores + w["mlp.gate.expert_bias"]
    groups, per_group = config["n_group"], config["num_experts"] // config["n_group"]
    outputs = []
    for t in range(len(x)):
        choice = biased[t].view(groups, per_group)
        kept = choice.topk(2).values.sum(1).topk(config["topk_group"]).indices
        outside = torch.full_like(choice, -torch.inf)
        outside[kept] = choice[kept]
        chosen = outside.view(-1).topk(config["num_experts_per_tok"]).indices
        weight = scores[t, chosen] / (scores[t, chosen].sum() + 1e-20)
        weight = weight * config["routed_scaling_factor"]
        parts = [swiglu(w, f"mlp.experts.{int(e)}", x[t]) for e in chosen]
        outputs.append(weight @ torch.stack(parts))
    return torch.stack(outputs) + swiglu(w, "mlp.shared_experts", x)


def swiglu(w: Weights, name: str, x: Tensor) -> Tensor:
    gate = F.silu(x @ w[f"{name}.gate_proj.weight"].T)
    return (gate * (x @ w[f"{name}.up_proj.weight"].T)) @ w[f"{name}.down_proj.weight"].T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def causal_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k [T, heads, d], v [T, heads, d_v] -> [T, heads * d_v]."""
    outputs = []
    for t in range(len(q)):
        scores = torch.einsum("hd,shd->hs", q[t], k[: t + 1]) * q.shape[2] ** -0.5
        outputs.append(torch.einsum("hs,shd->hd", scores.softmax(1), v[: t + 1]).reshape(-1))
    return torch.stack(outputs)


def angles(config: Config, tokens: int, dims: int) -> Tensor:
    """[tokens, 1, dims / 2]."""
    frequencies = config["rope_theta"] ** (-torch.arange(0, dims, 2) / dims)
    return (torch.arange(tokens).unsqueeze(1) * frequencies).unsqueeze(1)


def rotate_half_pairs(config: Config, x: Tensor) -> Tensor:
    """Rotary position on the first dimensions of x [T, heads, d]: i pairs with i + half."""
    dims = int(x.shape[2] * config["partial_rotary_factor"])
    a, b, rest = x.split([dims // 2, dims // 2, x.shape[2] - dims], dim=2)
    angle = angles(config, len(x), dims)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=2)


def rotate_neighbours(config: Config, x: Tensor) -> Tensor:
    """Rotary position on all of x [T, heads, d]: 2 i pairs with 2 i + 1."""
    angle = angles(config, len(x), x.shape[2])
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=3).flatten(2)
