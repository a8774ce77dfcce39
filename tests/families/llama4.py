"""Llama 4: transformers' own class of the text model, as the text part of a checkpoint or alone."""

from functools import partial
from pathlib import Path
from typing import Any

from families.case import Case, Oracle
from families.make import causal, drawn, random_model, write

SCOUT: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "attention_bias": False,
    "attention_chunk_size": 16,
    "floor_scale": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 24,
    "intermediate_size_mlp": 72,
    "max_position_embeddings": 256,
    "model_type": "llama4_text",
    "num_attention_heads": 24,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 5,
    "num_key_value_heads": 6,
    "num_local_experts": 24,
    "rms_norm_eps": 0.01,
    "rope_scaling": {
        "factor": 4.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_qk_norm": True,
    "vocab_size": 131,
}

MAVERICK: dict[str, Any] = SCOUT | {
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [],
    "rope_scaling": None,
    "use_qk_norm": False,
}

ALONE: dict[str, Any] = SCOUT | {
    "attn_scale": 0.2,
    "attn_temperature_tuning": True,
    "num_key_value_heads": 2,
    "no_rope_layers": [1, 0, 1, 1, 0],  # 0 where there is no rope
}


def save(folder: Path, config: dict[str, Any], part: bool) -> Oracle:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    model = random_model(Llama4ForCausalLM, Llama4TextConfig.from_dict(config))
    tensors = model.state_dict()
    if not part:
        write(folder, config, tensors)
        return causal(model)
    whole = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": {key: value for key, value in config.items() if key != "architectures"},
        "torch_dtype": "float32",
        "vision_config": {"hidden_size": 16},
    }
    seen = {
        "vision_model.class_embedding": (16,),
        "multi_modal_projector.linear_1.weight": (48, 16),
    }
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    write(folder, whole, tensors | drawn(seen, seed=1))
    return causal(model)


CASES = tuple(
    Case(
        name=f"llama4: {name}",
        family="llama4",
        oracle="transformers Llama4ForCausalLM",
        save=partial(save, config=config, part=part),
    )
    for name, config, part in (
        ("Scout", SCOUT, True),
        ("Maverick", MAVERICK, True),
        ("text model alone", ALONE, False),
    )
)
