"""lm-evaluation-harness, as it is, against a real server: its numbers are those of the engine."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from isomoe.engine import LLM, SamplingParams, TokenLogprob
from isomoe.eval import find_task, read_problems
from isomoe.eval.run import evaluate
from isomoe.weights import bundled_checkpoint
from servers import Server, running

TASKS = Path(__file__).parent / "lm_eval_tasks"
PROBLEMS = bundled_checkpoint() / "heldout.jsonl"
HARNESS_SECONDS = 300
NATS = 1e-3
"""Of a continuation in fp32. In bf16 an unlikely token's differ by 0.2 from batch to batch."""


def run_harness(server: Server, tasks: str, limit: int, folder: Path, **more: Any) -> Path:
    """Runs tasks without a network; the folder of the results."""
    settings = {
        "model": server.model,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": bundled_checkpoint(),
        "num_concurrent": 32,
        "max_length": 1024,
        "max_retries": 1,
        **more,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in settings.items())),
            *("--tasks", tasks, "--include_path", str(TASKS), "--limit", str(limit)),
            *("--log_samples", "--output_path", str(folder)),
        ],
        cwd=bundled_checkpoint(),  # the tasks name their data by its file alone
        env={**os.environ, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=HARNESS_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return folder / server.model


def only(folder: Path, pattern: str) -> str:
    (file,) = folder.glob(pattern)
    return file.read_text(encoding="utf-8")


def check_accuracy(results: Path, llm: LLM, limit: int) -> None:
    found = json.loads(only(results, "results_*.json"))["results"]["isomoe_arith"]
    assert found["sample_len"] == limit
    accuracy = found["exact_match,strict-match"]
    own = evaluate(llm, find_task("arith"), read_problems(PROBLEMS)[:limit]).strict
    low, high = own.interval
    print(f"accuracy {accuracy:.4f}, by isomoe eval {own.value:.4f} [{low:.4f}, {high:.4f}]")
    assert low <= accuracy <= high


def check_log_likelihoods(results: Path, llm: LLM, limit: int) -> None:
    samples = [json.loads(line) for line in only(results, "samples_*_choice_*.jsonl").splitlines()]
    pairs, answers = [], []
    for sample in samples:
        for index, ((logprob, is_greedy),) in enumerate(sample["resps"]):
            asked = sample["arguments"][f"gen_args_{index}"]
            pairs.append((asked["arg_0"], asked["arg_1"]))
            answers.append((float(logprob), is_greedy == "True"))
    assert len(pairs) == 2 * limit
    worst = 0.0
    for (logprob, is_greedy), tokens in zip(answers, score(llm, pairs), strict=True):
        worst = max(worst, abs(logprob - sum(token.logprob for token in tokens)))
        assert is_greedy == all(token.top[0][0] == token.token_id for token in tokens)
    print(f"log-likelihoods differ by up to {worst:.1e} nats")
    assert worst <= NATS


def score(llm: LLM, pairs: Sequence[tuple[str, str]]) -> list[list[TokenLogprob]]:
    """For each pair of a text and its continuation, the continuation's tokens."""
    lengths = [len(llm.tokenizer.encode(text)) for text, _ in pairs]
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    outputs = llm.generate([text + more for text, more in pairs], params)
    return [
        [token for token in (output.prompt_logprobs or ())[length:] if token is not None]
        for length, output in zip(lengths, outputs, strict=True)
    ]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The model is small, and the server needs the cores, too."""
    torch.set_num_threads(1)


@pytest.mark.slow
def test_the_harness_finds_the_accuracy_and_the_log_likelihoods_of_the_engine(
    tmp_path: Path,
) -> None:
    flags = ("--tp-size", "2", "--attn-dp-size", "2", "--ep-size", "2", "--dtype", "float32")
    tasks, limit = "isomoe_arith,isomoe_arith_choice", 50
    with running(*flags) as server:
        results = run_harness(server, tasks, limit, tmp_path)
    with LLM(dtype="float32") as llm:
        check_accuracy(results, llm, limit)
        check_log_likelihoods(results, llm, limit)


@pytest.mark.slow
def test_the_harness_finds_the_accuracy_of_the_engine_on_all_problems_sent_as_texts(
    dp_server: Server, tmp_path: Path
) -> None:
    limit = len(read_problems(PROBLEMS))
    results = run_harness(dp_server, "isomoe_arith", limit, tmp_path, tokenized_requests=False)
    with LLM() as llm:
        check_accuracy(results, llm, limit)
