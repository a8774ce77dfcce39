"""Whole comparisons of servers that are rules."""

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scripted_model
from asking import FP32, no_stage
from reply_server import Answer, Question, ReplyServer

from isomoe.engine import LLM
from isomoe.engine.model_info import ModelInfo
from isomoe.errors import ConfigError, EngineDeadError, RequestError
from isomoe.parity.measure import Workload, record
from isomoe.parity.report import Report
from isomoe.parity.run import Prompt, Run
from isomoe.parity.session import PromptChoice, Session
from isomoe.parity.targets.http_client import HttpSettings
from isomoe.parity.targets.parse import TargetSettings, target_of
from isomoe.parity.verdict import Verdict

SETTINGS = TargetSettings(
    engine=FP32,
    info=lambda: ModelInfo.of(FP32),
    stage=no_stage,
    http=HttpSettings(timeout_seconds=5.0),
)


def compared(folder: Path, *names: str, count: int = 5, **options: Any) -> Report:
    session = Session(
        names=names,
        settings=SETTINGS,
        folder=folder,
        prompts=PromptChoice(count=count),
        **{"max_tokens": 4, **options},
    )
    return session.measure()


def named(model: str) -> Callable[[Question], Answer]:
    """vLLM, with another model's name."""

    def answers(question: Question) -> Answer:
        answer = scripted_model.vllm(question)
        text = json.dumps(answer.document).replace(scripted_model.MODEL, model)
        return replace(answer, document=json.loads(text))

    return answers


def nowhere() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_target_that_fails_is_not_compared_and_the_others_are(tmp_path: Path) -> None:
    gone = nowhere()
    with ReplyServer(scripted_model.vllm) as fake:
        report = compared(tmp_path, fake.url, gone, fake.url)
    assert [row.judgement.verdict for row in report.rows] == [
        Verdict.NOT_COMPARED,
        Verdict.IDENTICAL,
    ]
    assert report.rows[0].judgement.reasons[0].startswith(f"{gone}: /v1/models: no connection")
    assert report.exit_code == 2
    assert len(list(tmp_path.glob("0*.json"))) == 3


@pytest.mark.parametrize(
    "error",
    [EngineDeadError("rank 0 was killed"), RequestError("too long"), ConfigError("no such file")],
)
def test_an_engine_that_cannot_start_is_not_compared(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> LLM:
        raise error

    monkeypatch.setattr(LLM, "from_config", dies)
    work = Workload(prompts=(Prompt((1, 2)),), max_tokens=2)
    baseline = Run(name="base", dialect="engine", prompts=work.prompts)
    found = record(target_of("tp1", SETTINGS), work, reference=baseline, stage=no_stage)
    assert found.error == f"tp1: {error}"


def test_two_servers_that_name_two_models_are_said_to(tmp_path: Path) -> None:
    with ReplyServer(named("small")) as ours, ReplyServer(named("large")) as theirs:
        report = compared(tmp_path, ours.url, theirs.url, ours.url)
    note = "names its model 'large', and the baseline 'small'"
    other, same = (row.comparison.other.notes for row in report.rows)
    assert note in other
    assert not any("names its model" in one for one in same)


def test_a_folder_that_cannot_be_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with ReplyServer(scripted_model.vllm) as fake:
        with pytest.raises(ConfigError, match="file/out: nothing can be written there"):
            compared(tmp_path / "file" / "out", fake.url, fake.url)
        assert fake.questions == []


def test_a_run_is_saved_with_what_it_was_asked(tmp_path: Path) -> None:
    with ReplyServer(scripted_model.vllm) as fake:
        compared(tmp_path, fake.url, fake.url, count=10, top=3, ignore_eos=True)
    for file in tmp_path.glob("0*.json"):
        run = Run.load(file)
        assert (run.max_tokens, run.ignore_eos, run.top, run.alone) == (4, True, 3, 2)
        assert run.gives_logprobs


def test_others_are_asked_as_a_saved_baseline_was(tmp_path: Path) -> None:
    with ReplyServer(scripted_model.vllm) as fake:
        compared(tmp_path / "a", fake.url, fake.url, count=10)
        (saved,) = (tmp_path / "a").glob("01-*.json")
        report = compared(tmp_path / "b", f"file:{saved}", fake.url, count=9, max_tokens=100)
    (row,) = report.rows
    assert row.judgement.verdict is Verdict.IDENTICAL
    assert (row.comparison.other.max_tokens, row.comparison.other.alone) == (4, 1)


def test_a_server_of_texts_alone_is_compared_in_words(tmp_path: Path) -> None:
    def silent(question: Question) -> Answer:
        answer = scripted_model.vllm(question)
        if question.path == "/tokenize":
            return Answer(document={"detail": "Not Found"}, status=404)
        for choice in answer.document.get("choices", ()):
            choice["logprobs"] = choice["token_ids"] = choice["prompt_logprobs"] = None
        return answer

    with ReplyServer(silent) as ours, ReplyServer(silent) as theirs:
        report = compared(tmp_path, ours.url, theirs.url)
    (row,) = report.rows
    assert not row.comparison.other.gives_logprobs
    assert row.comparison.common_tokens == 20
    assert row.judgement.verdict is Verdict.NOT_COMPARED
    assert not Run.load(next(tmp_path.glob("02-*.json"))).gives_logprobs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": -1}, "--top -1: must be at least 0"),
        ({"names": ("http://me:s3cret@host",)}, r"^\*\*\*@host: one target"),
        ({"names": ("tp1", "ftp://me:s3cret@host"), "bisects": True}, r"--bisect \*\*\*@host"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_shows_no_password(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        Session(**{"names": ("tp1", "tp1"), "settings": SETTINGS, "folder": tmp_path, **options})
    assert "s3cret" not in str(raised.value)


def test_flags_that_contradict_one_another_are_refused() -> None:
    with pytest.raises(ConfigError, match="--prompts and --random-prompts"):
        PromptChoice(file="a", random=3)
    with pytest.raises(ConfigError, match="--num-prompts and --random-prompts"):
        PromptChoice(count=2, random=3)
