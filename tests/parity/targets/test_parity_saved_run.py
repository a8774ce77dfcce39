"""A saved run in the place of a target."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scripted_model
from asking import FP32, decode, no_stage, score, server
from reply_server import ReplyServer

from isomoe.engine.model_info import ModelInfo
from isomoe.errors import ConfigError
from isomoe.parity.run import ALONE, Candidate, Place, Prompt, Run, Text
from isomoe.parity.targets.base import TargetError
from isomoe.parity.targets.engine import EngineTarget
from isomoe.parity.targets.http_target import HttpTarget
from isomoe.parity.targets.parse import TargetSettings, target_of
from isomoe.parity.targets.saved import SavedRun
from isomoe.parity.targets.transformers_target import TransformersTarget

PROMPTS = (Prompt((1, 2), "a"), Prompt((3,), "b"))


def text(*token_ids: int, logprob: float = -1.0) -> Text:
    return tuple(Place(Candidate(token_id, None, logprob)) for token_id in token_ids)


RUN = Run(
    name="tp2",
    dialect="engine",
    prompts=PROMPTS,
    outputs=(text(5, 6, 7), text(8, 9, 10)),
    scores=(text(5, 6, 7, logprob=-2.0), text(8, 9, 10, logprob=-2.0)),
    again={"alone": (text(5, 6, 7, logprob=-2.5), text(8, 9, 10, logprob=-2.5))},
)


def saved(tmp_path: Path, run: Run = RUN) -> SavedRun:
    run.save(tmp_path / "run.json")
    found = target_of(f"file:{tmp_path}/run.json", settings())
    assert isinstance(found, SavedRun)
    return found


def settings() -> TargetSettings:
    return TargetSettings(engine=FP32, info=lambda: ModelInfo.of(FP32), stage=no_stage)


def test_a_saved_baseline_answers_as_it_did(tmp_path: Path) -> None:
    found = saved(tmp_path).answer(PROMPTS, max_tokens=3, ignore_eos=False, reference=None)
    assert (found.outputs, found.scores, found.again) == (RUN.outputs, RUN.scores, RUN.again)
    assert found.name == f"file:{tmp_path}/run.json"
    assert "tp2" in found.notes[-1]


def test_a_saved_run_scores_the_same_tokens_of_another_baseline(tmp_path: Path) -> None:
    shorter = replace(RUN, outputs=(text(5, 6), text(8, 9)))
    found = saved(tmp_path).answer(PROMPTS, max_tokens=2, ignore_eos=False, reference=shorter)
    assert found.outputs == shorter.outputs
    assert found.scores == (text(5, 6, logprob=-2.0), text(8, 9, logprob=-2.0))


def test_a_saved_run_has_no_scores_of_other_tokens(tmp_path: Path) -> None:
    for outputs in ((text(5, 6, 7), text(8, 9, 11)), (text(5, 6, 7), text(8, 9, 10, 11))):
        other = replace(RUN, outputs=outputs)
        found = saved(tmp_path).answer(PROMPTS, max_tokens=4, ignore_eos=False, reference=other)
        assert (found.scores, found.again) == (None, {})
        assert "other tokens than this baseline's" in found.notes[-1]


def test_a_saved_run_is_asked_in_any_order_and_by_text(tmp_path: Path) -> None:
    asked = (Prompt(None, "b"), Prompt((1, 2)))
    found = saved(tmp_path).answer(asked, max_tokens=3, ignore_eos=False, reference=None)
    assert found.outputs == tuple(reversed(RUN.outputs))


def test_a_saved_run_knows_no_other_prompts(tmp_path: Path) -> None:
    for prompt in (Prompt((1, 2, 3), "a"), Prompt(None, "c"), Prompt((4,))):
        with pytest.raises(TargetError, match=r"^file:.*run.json: prompt 1 is none of the 2"):
            saved(tmp_path).answer(
                (PROMPTS[0], prompt), max_tokens=3, ignore_eos=False, reference=None
            )


def test_an_incomplete_run_is_named(tmp_path: Path) -> None:
    for run, message in (
        (replace(RUN, error="tp2: a worker died"), r"was not completed \(tp2: a worker died"),
        (replace(RUN, outputs=RUN.outputs[:1]), "holds 1 answers to 2 prompts"),
        (replace(RUN, scores=RUN.outputs[:1]), "holds 1 answers to 2 prompts"),
    ):
        with pytest.raises(TargetError, match=f"^file:.*run.json: .*{message}"):
            saved(tmp_path, run).answer(PROMPTS, max_tokens=3, ignore_eos=False, reference=None)


def test_a_run_that_was_asked_otherwise_is_named(tmp_path: Path) -> None:
    for run, message in (
        (replace(RUN, ignore_eos=True), "was decoded with --ignore-eos"),
        (replace(RUN, max_tokens=3), "was saved with --max-tokens 3"),
    ):
        with pytest.raises(TargetError, match=f"^file:.*run.json: {message}"):
            saved(tmp_path, run).answer(PROMPTS, max_tokens=4, ignore_eos=False, reference=RUN)


def test_it_is_known_which_prompts_were_sent_one_at_a_time(tmp_path: Path) -> None:
    found = saved(tmp_path, replace(RUN, alone=1))
    for asked, alone in ((PROMPTS, 1), (PROMPTS[1:], 1), (PROMPTS[:1], 0), (PROMPTS[::-1], None)):
        run = found.answer(asked, max_tokens=3, ignore_eos=False, reference=None)
        assert run.alone == alone


HOSTILE = {
    "name": 7,
    "dialect": None,
    "facts": 3,
    "prompts": [[1]],
    "outputs": [[[[5, "x", "no number"], [], 1]]],
    "scores": [[[[5.5, "x", -1.0], [], 1]]],
    "again": [],
    "gives_logprobs": "yes",
    "max_tokens": "many",
    "seconds": "long",
    "notes": [7],
    "error": False,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_with_a_wrong_value_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run.json"
    RUN.save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), name: HOSTILE[name]}))
    with pytest.raises(ConfigError, match=r"^file:.*run.json: not a whole run") as raised:
        Run.load(file)
    assert "\n" not in str(raised.value)


def test_what_is_not_finite_stays_so_and_a_lone_surrogate_is_saved(tmp_path: Path) -> None:
    odd = replace(
        RUN,
        facts={"model": "\udc80"},
        outputs=(text(5, logprob=math.nan), text(8, logprob=-math.inf)),
    )
    odd.save(tmp_path / "run.json")
    found = Run.load(tmp_path / "run.json")
    assert found.facts == odd.facts
    assert all(math.isnan(output[0].logprob) for output in found.outputs)


def test_a_run_that_cannot_be_saved_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RUN.save(tmp_path / "run.json")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ConfigError, match=r"run\.json: cannot be written \(No space"):
        replace(RUN, name="newer").save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == RUN
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_run_against_a_server_is_the_same_after_it_was_saved(tmp_path: Path) -> None:
    prompts = (Prompt((5, 6)), Prompt((7,)))
    with ReplyServer(scripted_model.vllm) as fake, server(fake.url) as target:
        outputs = decode(target, prompts)
        scores = score(target, outputs, prompts)
        alone = score(target, outputs, prompts, composition=ALONE)
        run = Run(
            name=target.name,
            dialect=target.dialect,
            facts=target.facts(),
            prompts=prompts,
            outputs=tuple(outputs),
            scores=tuple(scores),
            again={ALONE.name: tuple(alone)},
            notes=target.notes,
        )
    assert saved(tmp_path, run).run == run


@pytest.mark.parametrize(
    ("typed", "kind"),
    [
        ("http://127.0.0.1:30000", HttpTarget),
        ("HTTPS://example.com/v1", HttpTarget),
        ("hf:some/model", TransformersTarget),
        ("tp1", EngineTarget),
        ("tp2,dp2,ep2", EngineTarget),
        ("tp2,dp2,ep2+double-reduce", EngineTarget),
    ],
)
def test_what_is_typed_names_a_target(typed: str, kind: type) -> None:
    found = target_of(typed, settings())
    assert type(found) is kind
    assert found.name == typed


@pytest.mark.parametrize("typed", ["", "/models/qwen", "Qwen/Qwen3", "ftp://host", "run.json", "."])
def test_what_names_no_target_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"^target .*hf:PATH.*file:RUN.json.*tp2,dp2"):
        target_of(typed, settings())


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("hf:", r"target 'hf:': a path is missing"),
        ("file:", r"target 'file:': a path is missing"),
        ("file:/no/run.json", r"file:/no/run.json: not readable as JSON"),
        ("tp2,xx3", r"'xx3' is not one of tpN, dpN"),
        ("tp2+", r"the name of a defect is missing"),
        ("http://user:s3cret@host", r"\*\*\*@host"),
        ("ftp://user:s3cret@host", r"^target '\*\*\*@host': is none"),
    ],
)
def test_what_is_typed_wrongly_is_named(typed: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target_of(typed, settings())


def test_who_compares_servers_loads_neither_torch_nor_the_servers_extras() -> None:
    program = (
        "import sys; import isomoe.parity.targets.parse; "
        "print(sorted({'torch', 'transformers', 'fastapi', 'msgspec', 'zmq'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
