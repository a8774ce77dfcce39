"""What cannot be served is refused before anything runs, in one line that says why."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from isomoe.engine import LLM, SamplingParams
from isomoe.errors import CheckpointError, ConfigError, EngineDeadError, IsomoeError, RequestError


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), device="cpu", context_length=20, max_total_tokens=32) as llm:
        yield llm


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], r"^the prompt is empty$"),
        ([[1], []], r"^prompt 1: the prompt is empty$"),
        ([[1] * 20], r"^the prompt has 20 tokens, the context length is 20"),
        ([[1, 131]], r"^the prompt's token ids hold 131; the vocabulary is 0 to 130$"),
        ([[-1, 3]], r"^the prompt's token ids hold -1; the vocabulary is 0 to 130$"),
        ([[1, "a"]], r"^the prompt's token ids must be integers, not 'a'$"),
        ("text", r"has no tokenizer, so text cannot be used; token ids would work$"),
    ],
)
def test_bad_prompts(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate(prompts, SamplingParams(max_tokens=4))
    assert "\n" not in str(caught.value)
    assert not llm.core.has_work
    assert len(llm.generate([1], SamplingParams(max_tokens=1))) == 1


def test_other_bad_requests(llm: LLM, folder: Path) -> None:
    with pytest.raises(RequestError, match="2 prompts and 1 sampling_params"):
        llm.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(RequestError, match="stop texts need a tokenizer"):
        llm.generate([1], SamplingParams(stop=("x",)))
    with pytest.raises(RequestError, match="stop_token_ids hold 500"):
        llm.generate([1], SamplingParams(stop_token_ids=(500,)))
    with pytest.raises(RequestError, match="logit_bias hold 131; the vocabulary is 0 to 130"):
        llm.generate([1], SamplingParams(logit_bias=((131, 1.0),)))
    with pytest.raises(RequestError, match="has no tokenizer"):
        llm.generate([1], SamplingParams(regex="a"))
    with (
        LLM(str(folder), device="cpu", max_total_tokens=32) as small,
        pytest.raises(RequestError, match=r"need 4 pages of 16 tokens, the KV cache has 2"),
    ):
        small.generate([1] * 40, SamplingParams(max_tokens=10))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": 1.5},
        {"logprobs": -1},
        {"logprobs": 1000},
        {"prompt_logprobs": True},
        {"stop": ("",)},
        {"stop": "text"},
        {"stop": ("x",), "detokenize": False},
        {"seed": 0.5},
        {"seed": 2**63},
        {"max_tokens": 10**30},
        {"max_tokens": None},
        {"top_k": None},
        {"temperature": 10**400},
        {"temperature": 10**5000},
        {"stop": 5},
        {"stop": (5,)},
        {"stop": ("\ud800",)},
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": (True,)},
        {"stop_token_ids": "12"},
        {"ignore_eos": 1},
        {"detokenize": None},
        {"presence_penalty": 2.1},
        {"presence_penalty": float("nan")},
        {"presence_penalty": True},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": "1"},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": None},
        {"logit_bias": ((1, 100.5),)},
        {"logit_bias": ((1, float("nan")),)},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, True),)},
        {"logit_bias": ((1.0, 1.0),)},
        {"logit_bias": (1, 2)},
        {"logit_bias": {"1": 1.0}},
        {"logit_bias": 1},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"min_tokens": True},
        {"prompt_logprobs_start": -1, "prompt_logprobs": 0},
        {"prompt_logprobs_start": 1},
        {"json_schema": {"type": "object"}},
        {"json_schema": ""},
        {"json_schema": "{"},
        {"json_schema": "[1]"},
        {"json_schema": "1"},
        {"json_schema": '{"const": "\ud800"}'},
        {"json_schema": " " * 200_000 + "{}"},
        {"json_schema": "{}", "regex": "a"},
        {"regex": 5},
        {"regex": "a" * 200_000},
    ],
)
def test_bad_sampling_params_name_the_parameter(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"^{next(iter(wrong))} ") as caught:
        SamplingParams(**wrong)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"tp_size": 3}, ConfigError, "--tp-size 3: 3 does not divide 8 attention heads"),
        ({"tp_size": 2, "attn_dp_size": 3}, ConfigError, "--attn-dp-size 3 does not divide"),
        ({"context_length": 1000}, ConfigError, "--context-length 1000: the model has 256"),
        ({"dtype": "int8"}, ConfigError, "--dtype int8: must be one of auto, bfloat16, float32"),
        ({"page_size": 0}, ConfigError, "--page-size 0: must be at least 1"),
        ({"max_total_tokens": 3}, ConfigError, "--max-total-tokens 3: not even one page"),
        ({"instrument": "nowhere:x"}, ConfigError, "instrument 'nowhere:x': No module"),
        ({"instrument": "planted:lacks_methods"}, ConfigError, "has no method in_chain"),
    ],
)
def test_bad_settings(
    folder: Path, settings: dict[str, Any], kind: type[IsomoeError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        LLM(str(folder), **({"device": "cpu"} | settings))
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(str(tmp_path), device="cpu")


def test_an_engine_that_was_shut_down_says_so(folder: Path) -> None:
    llm = LLM(str(folder), device="cpu")
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate([1, 2])


def test_workers_import_neither_transformers_nor_tokenizers() -> None:
    code = (
        "import sys, isomoe.engine.worker_process; "
        "print([name for name in ('transformers', 'tokenizers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_is_refused_where_there_is_none(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--device cuda: torch sees no GPU.*--device cpu works"):
        LLM(str(folder), device="cuda")


def test_nan_is_an_error_and_not_an_answer(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    llm = LLM(str(tmp_path), device="cpu", max_total_tokens=32, context_length=20)
    with llm, pytest.raises(EngineDeadError, match="logits are not finite"):
        llm.generate([1, 2], SamplingParams(max_tokens=2))
