"""200 clean comparisons of the real engine, over layouts and prompts: nobody is told apart.

The layouts are started once each and asked everything; the prompts are then judged in groups.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import Random

import pytest

from isomoe.config import DType, EngineConfig
from isomoe.engine.model_info import ModelInfo
from isomoe.parity.compare import compare
from isomoe.parity.measure import Workload, record
from isomoe.parity.noise import Noise
from isomoe.parity.probe import Scale
from isomoe.parity.prompts import questions, random_ids
from isomoe.parity.run import Run, Text
from isomoe.parity.targets.engine import EngineTarget
from isomoe.parity.verdict import Verdict, judge
from isomoe.tokenizer import Tokenizer

BASELINE = "tp2"
LAYOUTS = ("tp1", "tp2,dp2", "tp2,ep2", "tp2,dp2,ep2", "tp4,dp2,ep4")
QUESTIONS, RANDOM_PROMPTS = 240, 60
GROUP = 12
DRAWS = 15
DRAWN = 100


@contextmanager
def quiet(_: str) -> Iterator[None]:
    yield None


def work_of(info: ModelInfo) -> Workload:
    """Held-out questions, and random ids, on which a model is far from sure; some of both alone."""
    encode = Tokenizer(info.folder).encode
    prompts = [
        *questions(info.folder / "heldout.jsonl", encode, QUESTIONS).prompts,
        *random_ids(RANDOM_PROMPTS, info.vocab_size, seed=3).prompts,
    ]
    Random(5).shuffle(prompts)
    return Workload(prompts=tuple(prompts), max_tokens=48)


def recorded(layout: str, dtype: DType, baseline: Run | None, probe: Scale | None = None) -> Run:
    config = EngineConfig(dtype=dtype, instrument=None if probe is None else probe.path)
    info = ModelInfo.of(config)
    target = EngineTarget(layout, config, info, quiet)
    return record(target, work_of(info), reference=baseline, stage=quiet)


def part(run: Run, chosen: Sequence[int]) -> Run:
    """What it says of some of the prompts."""

    def some(texts: Sequence[Text]) -> tuple[Text, ...]:
        return tuple(texts[index] for index in chosen)

    assert run.scores is not None
    assert run.alone is not None
    first = len(run.prompts) - run.alone
    return replace(
        run,
        prompts=tuple(run.prompts[index] for index in chosen),
        outputs=some(run.outputs),
        scores=some(run.scores),
        again={name: some(texts) for name, texts in run.again.items()},
        alone=sum(index >= first for index in chosen),
    )


def groups() -> list[list[int]]:
    """Groups of a dozen that share no prompt, and larger ones drawn from all."""
    total, random = QUESTIONS + RANDOM_PROMPTS, Random(11)
    apart = [list(range(start, start + GROUP)) for start in range(0, total, GROUP)]
    return [*apart, *(sorted(random.sample(range(total), DRAWN)) for _ in range(DRAWS))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT32])
def test_no_false_alarm_in_200_clean_comparisons(dtype: DType) -> None:
    baseline = recorded(BASELINE, dtype, None)
    ours = [part(baseline, chosen) for chosen in groups()]
    floors = [Noise.of(run) for run in ours]
    judged = 0
    for layout in LAYOUTS:
        other = recorded(layout, dtype, baseline)
        for chosen, run, noise in zip(groups(), ours, floors, strict=True):
            found = judge(compare(run, part(other, chosen)), noise)
            assert found.verdict in (Verdict.AGREES, Verdict.IDENTICAL), (layout, chosen, found)
            judged += 1
    assert judged == 200
    off = recorded(
        "tp2,dp2", dtype, baseline, Scale(block="model.layers.2.mlp.experts", factor=1.1)
    )
    found = judge(compare(baseline, off), Noise.of(baseline))
    assert found.verdict is Verdict.DIFFERS  # so the silence above is not deafness
