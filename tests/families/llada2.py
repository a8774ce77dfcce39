"""LLaDA 2: Ling 2.0's network under a block-causal mask.

Releases do not name their block size and mask token (32 and 156895); these checkpoints, being
smaller, do, as `block_size` and `mask_token_id`.
"""

from pathlib import Path
from typing import Any

from families.bailing_moe import V2, glm4_moe, published
from families.case import Case, Oracle
from families.make import block_causal, write

BLOCK, MASK_ID = 8, 130

CONFIG: dict[str, Any] = V2 | {
    "architectures": ["LLaDA2MoeModelLM"],
    "block_size": BLOCK,
    "mask_token_id": MASK_ID,
    "model_type": "llada2_moe",
    "num_nextn_predict_layers": 0,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
}


def save(folder: Path) -> Oracle:
    model = glm4_moe(CONFIG)
    write(folder, CONFIG, published(model.state_dict()))
    return block_causal(model, BLOCK)


CASES = (
    Case(
        name="llada2",
        family="llada2",
        oracle="transformers Glm4MoeForCausalLM, renamed, block-causal mask",
        save=save,
    ),
)
