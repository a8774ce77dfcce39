"""What `isomoe parity` can tell apart, and how often it is wrong: the figures of docs/parity.md.

Records the bundled checkpoint on several layouts, clean and with one layer off by a percent, then
draws subsets of the recorded prompts and judges each.

    python benchmarks/parity_power.py --runs FOLDER [--dtype float32] [--prompts 120]

FOLDER keeps the recorded runs, so that a second call only draws. A run that is there is not made
again.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import NormalDist, fmean, median

from isomoe.config import DType, EngineConfig
from isomoe.engine.model_info import ModelInfo
from isomoe.parity.compare import compare
from isomoe.parity.evidence import Half, Move, samples, shift_moves, shift_of
from isomoe.parity.measure import Workload, record
from isomoe.parity.noise import Noise
from isomoe.parity.probe import Scale
from isomoe.parity.prompts import DEFAULT_COUNT, questions
from isomoe.parity.run import Run
from isomoe.parity.student import exceeds
from isomoe.parity.targets.engine import EngineTarget
from isomoe.parity.thresholds import Thresholds
from isomoe.parity.verdict import MARGIN, MOST_TESTS
from isomoe.tokenizer import Tokenizer

BASELINE = "tp2"
CLEAN = ("tp1", "tp2,dp2", "tp2,ep2", "tp2,dp2,ep2", "tp4", "tp4,dp2,ep4")
OFF = "tp2,dp2"
BLOCKS = [
    f"model.layers.{layer}.{block}" for layer in range(4) for block in ("mlp.experts", "self_attn")
]
SIZES = (8, 15, 30, 60, 90, 120)
MAX_TOKENS = 100


@contextmanager
def quiet(_: str) -> Iterator[None]:
    yield None


class Recorder:
    """Runs of one dtype, asked as `isomoe parity` asks: from a folder or made now."""

    def __init__(self, folder: Path, dtype: str, count: int) -> None:
        self._folder = folder
        self._dtype = dtype
        self._config = EngineConfig(dtype=DType(dtype))
        self._info = ModelInfo.of(self._config)
        encode = Tokenizer(self._info.folder).encode
        prompts = questions(self._info.folder / "heldout.jsonl", encode, count).prompts
        self._work = Workload(prompts=prompts, max_tokens=MAX_TOKENS)
        self.baseline = self._run(BASELINE, None, None)

    def run(self, layout: str, probe: Scale | None = None) -> Run:
        """A layout's, with a block that is off or without."""
        return self._run(layout, probe, self.baseline)

    def _run(self, layout: str, probe: Scale | None, baseline: Run | None) -> Run:
        name = f"{layout}+{probe.block}x{probe.factor}" if probe else layout
        file = self._folder / f"{self._dtype}-{len(self._work.prompts)}-{name}.json"
        if file.is_file():
            return Run.load(file)
        config = replace(self._config, instrument=probe.path if probe else None)
        target = EngineTarget(layout, config, self._info, quiet)
        found = record(target, self._work, reference=baseline, stage=quiet)
        if found.error is not None:
            raise SystemExit(f"{name}: {found.error}")
        run = replace(found, name=name)
        run.save(file)
        return run


class Measured:
    """One run against the baseline: what the tests look at, of every prompt."""

    def __init__(self, baseline: Run, noise: Noise, other: Run) -> None:
        comparison = compare(baseline, other)
        self.halves = {half: samples(comparison, noise, half) for half in Half}
        self.moves = {half: shift_moves(found, noise.unit) for half, found in self.halves.items()}
        self.sizes = {
            half: [fmean(one.sizes) for one in found] for half, found in self.halves.items()
        }

    def caught(self, size: int, draws: int) -> float:
        """The share of subsets of so many prompts that are told apart, by scale or by shift."""
        random = Random(size)
        found = 0
        for _ in range(draws):
            chosen = random.sample(range(len(self.sizes[Half.FORCED])), size)
            chances = [
                chance
                for half in Half
                for chance in (
                    exceeds([self.sizes[half][index] for index in chosen], math.log(MARGIN)),
                    shift_of([self.moves[half][index] for index in chosen])[1],
                )
            ]
            found += MOST_TESTS * min(chances) < Thresholds().false_alarm
        return found / draws


def repeating(moves: Sequence[Move]) -> float:
    """How much of a prompt's move repeats in another prompt, against how much does not.

    g of docs/parity.md: the mean of D_i . D_j over pairs of prompts, divided by its root mean
    square.
    """
    products = [
        math.fsum(units * second[key][0] for key, (units, _) in first.items() if key in second)
        for index, first in enumerate(moves)
        for second in moves[:index]
    ]
    return fmean(products) / math.sqrt(fmean(product**2 for product in products))


def tokens_needed(per_token: float) -> float:
    """Tokens to tell a shift apart with the default false-alarm rate in 80% of tries."""
    normal = NormalDist()
    sure = normal.inv_cdf(1 - Thresholds().false_alarm / MOST_TESTS) + normal.inv_cdf(0.8)
    return math.sqrt(2) * sure / per_token if per_token > 0 else math.inf


def describe(name: str, measured: Measured, tokens: float, draws: int) -> str:
    """One row of the table. `tokens`: of a prompt, on average."""
    times = math.exp(fmean(measured.sizes[Half.FORCED]))
    per_token = repeating(measured.moves[Half.FORCED]) / tokens
    count = len(measured.sizes[Half.FORCED])
    shares = [f"{measured.caught(size, draws):.0%}" for size in SIZES if size <= count]
    cells = (f"{times:.2f}", f"{1e3 * per_token:.2f}", f"{tokens_needed(per_token):,.0f}", *shares)
    return f"| {name.removeprefix(OFF + '+model.')} | " + " | ".join(cells) + " |"


def calibration(clean: Sequence[Measured], draws: int) -> str:
    """How often `shift` gives small chances where each prompt's move has a random sign."""
    random = Random(1)
    chances = []
    for draw in range(draws):
        moves = random.sample(clean[draw % len(clean)].moves[Half.FORCED], 60)
        signs = [random.choice((-1, 1)) for _ in moves]
        signed = [
            {key: (sign * units, places) for key, (units, places) in move.items()}
            for sign, move in zip(signs, moves, strict=True)
        ]
        chances.append(shift_of(signed)[1])
    return ", ".join(
        f"below {level:g}: {sum(chance < level for chance in chances) / draws:.5f}"
        for level in (0.1, 0.01, 0.001, 0.0001)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompts", type=int, default=DEFAULT_COUNT, metavar="M")
    parser.add_argument("--draws", type=int, default=50, help="subsets of each size")
    parser.add_argument("--null-draws", type=int, default=10_000, help="of the calibration")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(args.runs, args.dtype, args.prompts)
    tokens = [len(output) for output in recorder.baseline.outputs]
    print(f"{args.dtype}: {len(tokens)} prompts, {sum(tokens)} tokens, {median(tokens)} a prompt")
    sizes = " | ".join(f"{n} prompts" for n in SIZES if n <= len(tokens))
    print(f"| target | times the floor | g per 1,000 tokens | tokens needed | {sizes} |")
    noise = Noise.of(recorder.baseline)
    clean = []
    for layout in CLEAN:
        clean.append(Measured(recorder.baseline, noise, recorder.run(layout)))
        print(describe(layout, clean[-1], fmean(tokens), args.draws), flush=True)
    for block in BLOCKS:
        run = recorder.run(OFF, Scale(block=block, factor=1.01))
        measured = Measured(recorder.baseline, noise, run)
        print(describe(run.name, measured, fmean(tokens), args.draws), flush=True)
    print("chances of shift under random signs:", calibration(clean, args.null_draws))


if __name__ == "__main__":
    main()
