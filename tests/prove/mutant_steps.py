"""Steps of a model with real weights on simulated ranks, with and without a mutant: where numbers
part."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import support
from isomoe.layout import Parallelism
from isomoe.models import CausalLM, build, read_config
from isomoe.prove import Mutant
from isomoe.stream import ResidualStream
from isomoe.weights import load_safetensors

PAGES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Prompt lengths of each attention-DP group, and the rows of a group that get logits."""

    lengths: tuple[tuple[int, ...], ...]
    padded: tuple[int, ...] | None = None
    last_rows: bool = False


STEPS = (
    Step(lengths=((1,), (1,))),
    Step(lengths=((3,), (3,))),
    Step(lengths=((4,), (1,))),
    Step(lengths=((6,), ())),
    Step(lengths=((9, 3), (12,))),
    Step(lengths=((9, 6), (5,)), last_rows=True),
    Step(lengths=((4,), (3,)), padded=(5, 5)),
)
"""Small and large, equal and ragged, one group alone, padded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a step's ranks saw.

    Attributes:
        reads: for each read, the settled residual that each rank holds.
        logits: of each rank.
    """

    reads: list[list["Held"]]
    logits: list["Held"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a rank holds of the rows of all.

    Attributes:
        values: zero in rows that it does not hold.
        rows: those that it holds; padding is none.
    """

    values: Tensor
    rows: Tensor

    @classmethod
    def all(cls, values: Tensor) -> "Held":
        return cls(values=values, rows=torch.ones(len(values), dtype=torch.bool))


class Ranks:
    """The ranks of one model, perhaps with a mutant in them."""

    def __init__(self, folder: Path, layout: Parallelism, mutant: Mutant | None = None) -> None:
        self.mutant = mutant
        self.models = [self._model(folder, layout, rank) for rank in range(layout.tp_size)]

    def _model(self, folder: Path, layout: Parallelism, rank: int) -> CausalLM:
        model = build(read_config(folder), layout, rank)
        if self.mutant is not None:
            model.chain = self.mutant.in_chain(model.chain)
            self.mutant.in_model(model)
        for leaf in model.leaves():
            leaf.allocate(torch.float32, torch.device("cpu"))
        load_safetensors(folder, model.weight_slices(), model.ignores, canonical=model.canonical)
        for memory in model.memories():
            memory.allocate_cache(PAGES, support.PAGE, torch.float32, torch.device("cpu"))
            memory.allocate_states(8, torch.device("cpu"))
        return model

    def run(self, step: Step) -> Seen:
        """One prefill step."""
        mesh = self.models[0].seat.mesh
        groups = mesh.size_of(mesh.attn_dp)
        lengths = step.lengths if groups == 2 else (sum(step.lengths, ()),) * groups
        reads: dict[int, list[Held]] = {rank: [] for rank in range(mesh.size)}

        def stream_of(*args: Any) -> ResidualStream:
            stream = ResidualStream(*args)
            self._watch(stream, reads[stream.comm.seat.rank])
            if self.mutant is not None:
                self.mutant.in_stream(stream)
            return stream

        chosen = [[sum(group) - 1] if group else [] for group in lengths]
        with patch.object(support, "ResidualStream", stream_of):
            logits = support.simulate(
                self.models,
                [[_prompt(n, 7 * g + i) for i, n in enumerate(p)] for g, p in enumerate(lengths)],
                step.padded if groups == 2 else None,
                chosen=chosen if step.last_rows else None,
            )
        return Seen(
            reads=[list(each) for each in zip(*reads.values(), strict=True)],
            logits=[Held.all(each) for each in logits],
        )

    def _watch(self, stream: ResidualStream, seen: list[Held]) -> None:
        read = stream.read

        def watched(*args: Any, **more: Any) -> Any:
            normed = read(*args, **more)
            seen.append(_rows_of(stream, len(seen)))
            return normed

        stream.read = watched  # type: ignore[method-assign]


def _rows_of(stream: ResidualStream, index: int) -> Held:
    """A read's residual."""
    assert stream._residual is not None
    held, rank = stream._residual, stream.comm.seat.rank
    row_axes = stream.plan.reads[index].residual.row_axes
    start, stop = stream.rows.span(rank, row_axes)
    values = torch.zeros(stream.rows.total, held.shape[1])
    values[start:stop] = held
    is_held = torch.zeros(stream.rows.total, dtype=torch.bool)
    is_held[start:stop] = True
    if stream.rows is stream.tokens:
        for rows in stream.tokens.padding(rank, 0):
            is_held[rows] = False
    return Held(values=values, rows=is_held)


def _prompt(length: int, salt: int) -> list[int]:
    return [(5 * place * place + 11 * place + 37 * salt) % 600 + 5 for place in range(length)]


def parted(clean: Seen, other: Seen) -> Iterator[int]:
    """The reads at which some rank's residual is another; behind them one more for the logits."""
    for index, (ours, theirs) in enumerate(
        zip([*clean.reads, clean.logits], [*other.reads, other.logits], strict=True)
    ):
        if not _same(ours, theirs):
            yield index


def _same(ours: Sequence[Held], theirs: Sequence[Held]) -> bool:
    """Whether ranks hold the same, bit for bit, as far as both runs let them hold it.

    Both do the same sums in the same order where no mutant acts. NaN is never the same.
    """
    pairs = list(zip(ours, theirs, strict=True))
    if any(a.values.shape != b.values.shape for a, b in pairs):
        return False
    found = [(a.values[both], b.values[both]) for a, b in pairs for both in [a.rows & b.rows]]
    assert any(len(a) for a, _ in found), "nothing to compare"
    return all(torch.equal(a, b) for a, b in found)


def writers(model: CausalLM, read: int) -> set[str]:
    """The kinds of block that wrote between a read and the one before.

    The last read may have been of other rows than the lm_head should get; behind it is the lm_head.
    """
    reads = model.chain.reads
    if read == 0:
        return {model.embedding.spec.kind}
    last = {model.lm_head.spec.kind} if read == len(reads) - 1 else set()
    return last | {block.kind for block in reads[read - 1].consumers}
