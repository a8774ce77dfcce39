"""A block-diffusion model behind the server: blocks of tokens, and its schedule in requests."""

import shutil
from importlib import resources
from pathlib import Path

import httpx2 as httpx

from families import sdar_moe
from families.reference_block_diffusion import decode, sdar_static, sglang_low_confidence
from servers import running

BLOCK, MASK, NEW = sdar_moe.BLOCK, sdar_moe.MASK_ID, 9
CHECKPOINT = Path(str(resources.files("isomoe"))) / "checkpoints" / "arith-moe"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PROMPT = [5, 9, 2, 7, 7, 1]


def test_both_apis_take_a_schedule_and_answer_as_the_published_loops(tmp_path: Path) -> None:
    oracle = sdar_moe.CASES[0].save(tmp_path)

    def expected(rule: object) -> list[int]:
        return decode(oracle, PROMPT, rule, block=BLOCK, mask_id=MASK, new_tokens=NEW).ids  # type: ignore[arg-type]

    asked = {"temperature": 0, "ignore_eos": True}
    schedule = {"denoising_strategy": "static", "denoising_steps": 2}
    for file in TOKENIZER:
        shutil.copy(CHECKPOINT / file, tmp_path)
    with running("--model-path", str(tmp_path), "--dtype", "float32") as s:
        native = httpx.post(
            f"{s.url}/generate",
            json={
                "input_ids": PROMPT,
                "sampling_params": {**asked, "max_new_tokens": NEW, **schedule},
                "return_logprob": True,
            },
        ).json()
        assert native["output_ids"] == expected(sdar_static(BLOCK, 2))
        assert len(native["meta_info"]["output_token_logprobs"]) == NEW
        openai = httpx.post(
            f"{s.url}/v1/completions",
            json={"prompt": PROMPT, **asked, "max_tokens": NEW, "return_token_ids": True},
        ).json()
        assert openai["choices"][0]["token_ids"] == expected(sglang_low_confidence(0.95))
        refused = httpx.post(
            f"{s.url}/generate",
            json={
                "input_ids": PROMPT,
                "sampling_params": {"denoising_strategy": "best"},
            },
        )
        assert refused.status_code == 400
        assert "denoising_strategy" in refused.text
