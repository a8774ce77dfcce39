"""Mixtral: transformers' own class, with and without a window."""

from functools import partial
from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import causal, random_model, split_experts, write

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 48,
    "head_dim": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
    "model_type": "mixtral",
    "num_attention_heads": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 131,
}


def save(folder: Path, **changes: Any) -> Oracle:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = CONFIG | changes
    model = random_model(MixtralForCausalLM, MixtralConfig.from_dict(config))
    tensors = {
        name.replace(".mlp.", ".block_sparse_moe."): tensor
        for name, tensor in split_experts(model.state_dict(), "w1", "w3", "w2").items()
    }
    write(folder, config, tensors)
    return causal(model)


CASES = (
    Case(
        name="mixtral",
        family="mixtral",
        oracle="transformers MixtralForCausalLM",
        save=save,
    ),
    Case(
        name="mixtral with a window, heads of hidden size over heads, and tied embeddings",
        family="mixtral",
        oracle="transformers MixtralForCausalLM",
        save=partial(save, sliding_window=5, head_dim=None, tie_word_embeddings=True),
    ),
)
