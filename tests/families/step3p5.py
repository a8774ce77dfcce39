"""Step-3.5-Flash: the text stack of transformers' Step-3.7, which is the same, and an output head.

Layers: full and dense; sliding and dense; sliding with experts; sliding with clamped experts; full
with clamped experts. Two MTP layers lengthen the per-layer lists, and the checkpoint holds some of
their tensors.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.case import Case, Oracle
from families.make import drawn, random_model, write

FULL, SLIDING = "full_attention", "sliding_attention"

CONFIG: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "att_impl_type": "GQA",
    "attention_other_setting": {
        "attention_type": SLIDING,
        "num_attention_heads": 48,
        "num_attention_groups": 2,
        "head_dim": 16,
        "true_head_dim": 16,
    },
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
    "head_dim": 16,
    "hidden_size": 48,
    "intermediate_size": 72,
    "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL, SLIDING, SLIDING],
    "max_position_embeddings": 256,
    "max_seq_len": 256,
    "moe_every_n_layer": 1,
    "moe_intermediate_size": 24,
    "moe_layer_offset": 0,
    "moe_layers_enum": "2,3,4",
    "moe_num_experts": 24,
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0,
    "moe_top_k": 3,
    "need_fp32_gate": True,
    "norm_expert_weight": True,
    "num_attention_groups": 2,
    "num_attention_heads": 24,
    "num_hidden_layers": 5,
    "num_nextn_predict_layers": 2,
    "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0],
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "rope_theta": [500.0, 100.0, 100.0, 100.0, 500.0, 100.0, 100.0],
    "share_expert_dim": 48,
    "sliding_window": 8,
    "swiglu_limits": [0.0, 0.0, 0.0, 0.5, 0.6, 0.0, 0.0],
    "swiglu_limits_shared": [0.0, 0.9, 0.0, 0.8, 0.7, 0.0, 0.0],
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_head_wise_attn_gate": True,
    "use_moe": True,
    "use_moe_router_bias": True,
    "use_qk_norm": True,
    "vocab_size": 131,
    "yarn_only_types": [FULL],
    "zero_centered": True,
}


def save(folder: Path) -> Oracle:
    from transformers.models.step3p7 import Step3p7TextConfig, Step3p7TextModel

    model = random_model(Step3p7TextModel, Step3p7TextConfig.from_dict(CONFIG))
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("norm.weight"):
            tensor -= 1.0  # stored as the distance from one
    head = drawn({"lm_head.weight": (131, 48)}, seed=1)
    write(folder, CONFIG, published(state) | head | mtp_tensors())

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        hidden: Tensor = model(ids.unsqueeze(0), use_cache=False).last_hidden_state[0]
        return hidden @ head["lm_head.weight"].T

    return logits


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under the names of the release."""
    tensors = {}
    for name, tensor in state.items():
        at, _, part = f"model.{name}".partition(".mlp.")
        if part == "gate.e_score_correction_bias":
            tensors[f"{at}.moe.router_bias"] = tensor
        elif part == "gate.weight":
            tensors[f"{at}.moe.gate.weight"] = tensor
        elif part == "experts.gate_up_proj":
            tensors[f"{at}.moe.gate_proj.weight"], tensors[f"{at}.moe.up_proj.weight"] = (
                tensor.chunk(2, dim=1)
            )
        elif part == "experts.down_proj":
            tensors[f"{at}.moe.down_proj.weight"] = tensor
        elif part.startswith("shared_experts."):
            tensors[f"{at}.share_expert.{part.removeprefix('shared_experts.')}"] = tensor
        else:
            tensors[f"model.{name}"] = tensor
    return tensors


def mtp_tensors() -> dict[str, Tensor]:
    """Some of what releases carry of their prediction layers."""
    shapes = {
        "enorm.weight": (48,),
        "eh_proj.weight": (48, 96),
        "self_attn.q_proj.weight": (48 * 16, 48),
        "transformer.shared_head.output.weight": (131, 48),
    }
    return drawn(
        {f"model.layers.{at}.{name}": shape for at in (5, 6) for name, shape in shapes.items()},
        seed=2,
    )


CASES = (
    Case(
        name="step3p5",
        family="step3p5",
        oracle="transformers Step3p7TextModel and an output head",
        save=save,
    ),
)
