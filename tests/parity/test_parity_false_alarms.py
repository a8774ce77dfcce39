"""200 clean comparisons of the real engine, over layouts and prompts: nobody is told apart.

The layouts are started once each and asked everything; the prompts are then judged in groups.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import Random

import pytest

from isomoe.config import DType, EngineConfig
from isomoe.engine.model_info import ModelInfo
from isomoe.parity.compare import compare
from isomoe.parity.noise import Noise
from isomoe.parity.probe import Scale
from isomoe.parity.run import ALONE, PAIRS, TOGETHER, Prompt, Run, Text
from isomoe.parity.targets.engine import EngineTarget
from isomoe.parity.verdict import Verdict, judge
from isomoe.tokenizer import Tokenizer

BASELINE = "tp2"
LAYOUTS = ("tp1", "tp2,dp2", "tp2,ep2", "tp2,dp2,ep2", "tp4,dp2,ep4")
QUESTIONS, RANDOM_PROMPTS = 240, 60
MAX_TOKENS = 48
GROUP = 12
DRAWS = 15
DRAWN = 100


@contextmanager
def quiet(_: str) -> Iterator[None]:
    yield None


def prompts_of(info: ModelInfo) -> tuple[Prompt, ...]:
    """Held-out questions, and random ids, on which a model is far from sure."""
    tokenizer, random = Tokenizer(info.folder), Random(3)
    lines = (info.folder / "heldout.jsonl").read_text().splitlines()[:QUESTIONS]
    questions = [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]
    return (
        *(Prompt(tuple(tokenizer.encode(question)), question) for question in questions),
        *(
            Prompt(tuple(random.randrange(info.vocab_size) for _ in range(random.randint(8, 48))))
            for _ in range(RANDOM_PROMPTS)
        ),
    )


def record(layout: str, dtype: DType, baseline: Run | None, probe: Scale | None = None) -> Run:
    config = EngineConfig(dtype=dtype, instrument=None if probe is None else probe.path)
    info = ModelInfo.of(config)
    prompts = prompts_of(info)
    target = EngineTarget(layout, config, info, quiet)
    with target:
        outputs = target.generate(
            prompts, max_tokens=MAX_TOKENS, ignore_eos=False, top=5, composition=TOGETHER
        )
        given = outputs if baseline is None else baseline.outputs
        compositions = (TOGETHER, ALONE, PAIRS) if baseline is None else (TOGETHER,)
        scored = {
            how.name: tuple(target.score(prompts, given, top=5, composition=how))
            for how in compositions
        }
    return Run(
        name=target.name,
        dialect=target.dialect,
        facts=target.facts(),
        prompts=prompts,
        outputs=tuple(outputs),
        scores=scored.pop(TOGETHER.name),
        again=scored,
    )


def part(run: Run, chosen: Sequence[int]) -> Run:
    def some(texts: Sequence[Text]) -> tuple[Text, ...]:
        return tuple(texts[index] for index in chosen)

    assert run.scores is not None
    return replace(
        run,
        prompts=tuple(run.prompts[index] for index in chosen),
        outputs=some(run.outputs),
        scores=some(run.scores),
        again={name: some(texts) for name, texts in run.again.items()},
    )


def groups() -> list[list[int]]:
    """Groups of a dozen that share no prompt, and larger ones drawn from all."""
    total, random = QUESTIONS + RANDOM_PROMPTS, Random(11)
    apart = [list(range(start, start + GROUP)) for start in range(0, total, GROUP)]
    return [*apart, *(random.sample(range(total), DRAWN) for _ in range(DRAWS))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT32])
def test_no_false_alarm_in_200_clean_comparisons(dtype: DType) -> None:
    baseline = record(BASELINE, dtype, None)
    ours = [part(baseline, chosen) for chosen in groups()]
    floors = [Noise.of(run) for run in ours]
    judged = 0
    for layout in LAYOUTS:
        other = record(layout, dtype, baseline)
        for chosen, run, noise in zip(groups(), ours, floors, strict=True):
            found = judge(compare(run, part(other, chosen)), noise)
            assert found.verdict in (Verdict.AGREES, Verdict.IDENTICAL), (layout, chosen, found)
            judged += 1
    assert judged == 200
    off = record("tp2,dp2", dtype, baseline, Scale(block="model.layers.2.mlp.experts", factor=1.1))
    found = judge(compare(baseline, off), Noise.of(baseline))
    assert found.verdict is Verdict.DIFFERS  # so the silence above is not deafness
