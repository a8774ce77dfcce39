"""gpt-oss with unquantised experts: transformers' own class, whose layout is the published one."""

from functools import partial
from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import causal, random_model, write

CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 2,
    "experts_per_token": 3,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initial_context_length": 32,
    "intermediate_size": 72,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 256,
    "model_type": "gpt_oss",
    "num_attention_heads": 24,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 24,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 8,
    "swiglu_limit": 1.5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 131,
}


def save(folder: Path, **changes: Any) -> Oracle:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = CONFIG | changes
    model = random_model(GptOssForCausalLM, GptOssConfig.from_dict(config))
    write(folder, config, model.state_dict())
    return causal(model)


CASES = (
    Case(
        name="gpt_oss",
        family="gpt_oss",
        oracle="transformers GptOssForCausalLM",
        save=save,
    ),
    Case(
        name="gpt_oss without attention biases, and every other layer sliding by default",
        family="gpt_oss",
        oracle="transformers GptOssForCausalLM",
        save=partial(save, attention_bias=False, layer_types=None),
    ),
)
