"""The model's shape, and a forward for training that computes every expert on every token.

With 16 small experts the dense product is two large matrix products, faster than any dispatch,
and a weight of zero leaves an unchosen expert out exactly. Parameters, names and numbers are those
of `Qwen3MoeForCausalLM`: only the order of summation over experts differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from recipes.arith.tokenizer import IM_END, MAX_LENGTH
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeSparseMoeBlock,
)

Block = Qwen3MoeSparseMoeBlock


def config(tokenizer: PreTrainedTokenizerBase, **changes: int) -> Qwen3MoeConfig:
    """The checkpoint's configuration. `changes` replace sizes, for trials."""
    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
    } | changes
    return Qwen3MoeConfig(
        **sizes,
        vocab_size=len(tokenizer),
        intermediate_size=512,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.01,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.04,
        tie_word_embeddings=False,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, ending with either form's last token."""
    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)],
        pad_token_id=tokenizer.pad_token_id,
    )


def blocks(model: Qwen3MoeForCausalLM) -> list[Block]:
    """The MoE block of each layer."""
    return [layer.mlp for layer in model.model.layers]


def dense_forward(block: Block, hidden_states: Tensor) -> Tensor:
    """The block's output, all experts computed. Leaves `block.router_logits` [tokens, experts].

    A `block.scale` that is not None ([rows, 1, 1], or a number) multiplies the output.
    """
    x = hidden_states.view(-1, hidden_states.shape[-1])
    logits, weights, chosen = block.gate(x)
    block.router_logits = logits
    experts = block.experts
    num, two_width, hidden = experts.gate_up_proj.shape
    mix = torch.zeros_like(logits).scatter(1, chosen, weights)
    gate, up = (
        F.linear(x, experts.gate_up_proj.view(num * two_width, hidden))
        .view(-1, num, 2, two_width // 2)
        .unbind(2)
    )
    inner = (F.silu(gate) * up * mix.unsqueeze(-1)).flatten(1)
    down = experts.down_proj.transpose(1, 2).reshape(num * two_width // 2, hidden)
    output = (inner @ down).view_as(hidden_states)
    scale = getattr(block, "scale", None)
    return output if scale is None else output * scale


def set_scales(model: Qwen3MoeForCausalLM, scales: Sequence[Tensor | float | None]) -> None:
    """Sets what `dense_forward` multiplies each layer's MoE output by."""
    for block, scale in zip(blocks(model), scales, strict=True):
        block.scale = scale


@contextmanager
def block_forward(forward: Callable[[Block, Tensor], Tensor]) -> Iterator[None]:
    """Replaces the forward of every MoE block, for a while."""
    original = Block.forward
    Block.forward = forward
    try:
        yield
    finally:
        Block.forward = original
