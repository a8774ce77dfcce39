"""Known defects as a measure of the checks: each is planted, and every level says what it sees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from random import Random

from isomoe.config import Device, DType, EngineConfig
from isomoe.engine import LLM
from isomoe.engine.model_info import ModelInfo
from isomoe.errors import IsomoeError, PlacementError
from isomoe.layout import Parallelism
from isomoe.parity.bisect import Side, bisect, side_of
from isomoe.parity.compare import compare
from isomoe.parity.inject import instrument_of
from isomoe.parity.measure import Workload, record
from isomoe.parity.noise import Noise
from isomoe.parity.prompts import DEFAULT_COUNT, questions, random_ids
from isomoe.parity.run import Ids, Run
from isomoe.parity.targets.base import Stage
from isomoe.parity.targets.engine import EngineTarget
from isomoe.parity.verdict import Verdict, judge
from isomoe.prove.corpus import Level, ids_of
from isomoe.prove.levels import Levels, levels
from isomoe.prove.miniature import checkpoint
from isomoe.prove.mutants import Mutant
from isomoe.tokenizer import Tokenizer, has_tokenizer

_BISECT_LENGTHS = (74, 60, 48, 76)
"""Ragged over two groups, and more rows than a small step has."""


class Outcome(StrEnum):
    """What a run of the engine with a defect came to."""

    CAUGHT = "differs"
    MISSED = "agrees"
    UNCHANGED = "same bits"
    """The numbers of this workload are not changed."""
    DIED = "does not end"
    """The ranks stop with an error that names one of them."""
    REFUSED = "refused"
    """The engine does not start."""
    NOT_COMPARED = "not compared"
    """The run ends, and nothing is concluded from it."""
    NOT_RUN = "not run"


_OUTCOMES = {
    Verdict.DIFFERS: Outcome.CAUGHT,
    Verdict.AGREES: Outcome.MISSED,
    Verdict.IDENTICAL: Outcome.UNCHANGED,
    Verdict.NOT_COMPARED: Outcome.NOT_COMPARED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One defect, and who sees it.

    Attributes:
        ids: the historic defects that it stands for.
        seen: what the type check and the proof say.
        verdict: of the default comparison, the clean layout against the broken one.
        effect: how many times the noise floor its deltas are; None where not measured.
        named: the block that the bisection names; None where it did not run or names none.
        broke: why the bisection came to no end; empty if it did, or did not run.
        why: of a verdict that is not about numbers.
    """

    mutant: Mutant
    ids: tuple[str, ...]
    seen: Levels
    verdict: Outcome
    effect: float | None = None
    named: str | None = None
    broke: str = ""
    why: str = ""

    @property
    def block_is_right(self) -> bool:
        """Whether the bisection names the block that the defect touches first."""
        return self.named is not None and self.mutant.block in self.named.split(" + ")

    @property
    def changes_numbers(self) -> bool:
        """Whether the run ends, with other numbers."""
        return self.verdict in (Outcome.CAUGHT, Outcome.MISSED)

    @property
    def is_caught(self) -> bool:
        """Whether every level sees it that ought to.

        What does not run, or changes no number, is for the proof alone to see.
        """
        if self.verdict in (Outcome.MISSED, Outcome.NOT_COMPARED):
            return False
        if self.seen.expected == (Level.NUM,):
            return self.verdict in (Outcome.CAUGHT, Outcome.DIED)
        if self.verdict is Outcome.UNCHANGED and Level.NUM in self.seen.expected:
            return False
        return self.seen.type_check or self.seen.proof

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {
            "mutant": self.mutant.name,
            "operator": self.mutant.code,
            "what": self.mutant.what,
            "historic_ids": list(self.ids),
            "model": self.mutant.model,
            "layout": self.mutant.layout,
            "expected_levels": [str(level) for level in self.seen.expected],
            "type_check": self.seen.type_check,
            "proof": self.seen.proof,
            "verdict": str(self.verdict),
            "effect": self.effect,
            "block": self.mutant.block,
            "bisect_names": self.named,
            "bisect_error": self.broke,
            "why": self.why,
            "caught": self.is_caught,
        }


Each = Callable[[Row], None]
"""Called with each row as soon as it is known."""


def measure(mutants: Sequence[Mutant], folder: Path, stage: Stage, each: Each) -> list[Row]:
    """Plants every mutant where it acts, at the default size of a comparison.

    Args:
        folder: for the small checkpoints of models that ship as a config alone.
    """
    benches: dict[tuple[str, str], _Bench] = {}
    rows = []
    for mutant in sorted(mutants, key=lambda one: (one.model, one.layout)):
        where = mutant.model, mutant.layout
        if where not in benches:
            benches.clear()  # one baseline at a time is kept
            benches[where] = _Bench(*where, folder, stage)
        row = _row(mutant, benches[where])
        each(row)
        rows.append(row)
    return rows


def _row(mutant: Mutant, bench: "_Bench") -> Row:
    row = Row(
        mutant=mutant,
        ids=tuple(ids_of(mutant.name)),
        seen=levels(mutant),
        verdict=Outcome.NOT_RUN,
    )
    if mutant.engine_refusal is not None:
        return replace(row, why=mutant.engine_refusal)
    refusal = bench.refusal(mutant) if row.seen.type_check else None
    if refusal is not None:
        return replace(row, verdict=Outcome.REFUSED, why=refusal)
    return bench.run(row)


class _Bench:
    """One model on one layout, clean: what its mutants are compared with."""

    def __init__(self, model: str, layout: str, folder: Path, stage: Stage) -> None:
        path = checkpoint(model, folder / model)
        # Random weights turn on one bit in bf16; a trained model does not.
        is_trained = has_tokenizer(path)
        dtype = DType.AUTO if is_trained else DType.FLOAT32
        self.config = EngineConfig(model_path=str(path), device=Device.CPU, dtype=dtype)
        self.info = ModelInfo.of(self.config)
        self.layout = layout
        self.stage = stage
        if is_trained:
            encode = Tokenizer(path).encode
            prompts = questions(path / "heldout.jsonl", encode, DEFAULT_COUNT).prompts
        else:
            prompts = random_ids(DEFAULT_COUNT, self.info.vocab_size, seed=0).prompts
        self.work = Workload(prompts=prompts, max_tokens=100, ignore_eos=not is_trained)
        self._baseline: Run | None = None
        self._noise: Noise | None = None
        self._side: Side | None = None

    def refusal(self, mutant: Mutant) -> str | None:
        """What the engine says where it does not start with a mutant; None if it starts."""
        config = replace(
            self.config,
            parallelism=Parallelism.parse(self.layout),
            instrument=instrument_of(mutant.name, self.info.hf_config),
        )
        try:
            with LLM.from_config(config):
                return None
        except PlacementError as error:
            return str(error)
        except IsomoeError:  # how it ends, the run says
            return None

    def run(self, row: Row) -> Row:
        """The verdict on a mutant, and the block that the bisection names."""
        if self._baseline is None or self._noise is None:
            self._baseline = record(self._target(), self.work, reference=None, stage=self.stage)
            self._noise = Noise.of(self._baseline)
        broken = record(
            self._target(row.mutant), self.work, reference=self._baseline, stage=self.stage
        )
        if broken.error is not None:
            return replace(row, verdict=Outcome.DIED, why=broken.error)
        compared = compare(self._baseline, broken)
        judged = judge(compared, self._noise)
        verdict = _OUTCOMES[judged.verdict]
        if verdict is Outcome.NOT_COMPARED:
            return replace(row, verdict=verdict, why="; ".join(judged.reasons))
        row = replace(row, verdict=verdict, effect=judged.effect)
        return self._bisected(row) if row.changes_numbers else row

    def _target(self, mutant: Mutant | None = None) -> EngineTarget:
        return EngineTarget(self._name(mutant), self.config, self.info, self.stage)

    def _name(self, mutant: Mutant | None) -> str:
        return self.layout if mutant is None else f"{self.layout}+{mutant.name}"

    def _bisected(self, row: Row) -> Row:
        if self._side is None:
            self._side = side_of("tp1", self.config, self.info, self.stage)
        other = side_of(self._name(row.mutant), self.config, self.info, self.stage)
        try:
            culprit = bisect(self._side, other, _texts(self.info.vocab_size)).culprit
        except IsomoeError as error:
            return replace(row, broke=str(error))
        return row if culprit is None else replace(row, named=culprit.block_kind)


def _texts(vocab_size: int) -> list[Ids]:
    random = Random(3)
    return [
        tuple(random.randrange(1, vocab_size) for _ in range(length)) for length in _BISECT_LENGTHS
    ]
