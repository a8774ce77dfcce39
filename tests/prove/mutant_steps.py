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
        reads: for each read, the settled residual that each rank holds, as `_rows_of` has it.
        logits: of each rank.
    """

    reads: list[list[Tensor]]
    logits: list[Tensor]


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
        reads: dict[int, list[Tensor]] = {rank: [] for rank in range(mesh.size)}

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
        return Seen(reads=[list(each) for each in zip(*reads.values(), strict=True)], logits=logits)

    def _watch(self, stream: ResidualStream, seen: list[Tensor]) -> None:
        read = stream.read

        def watched(*args: Any, **more: Any) -> Any:
            normed = read(*args, **more)
            seen.append(_rows_of(stream, len(seen)))
            return normed

        stream.read = watched  # type: ignore[method-assign]


def _rows_of(stream: ResidualStream, index: int) -> Tensor:
    """All rows of a read's residual; NaN for those of other ranks, and for padding."""
    assert stream._residual is not None
    held, rank = stream._residual, stream.comm.seat.rank
    row_axes = stream.plan.reads[index].residual.row_axes
    start, stop = stream.rows.span(rank, row_axes)
    found = torch.full((stream.rows.total, held.shape[1]), torch.nan)
    found[start:stop] = held
    if stream.rows is stream.tokens:
        for rows in stream.tokens.padding(rank, 0):
            found[rows] = torch.nan
    return found


def _prompt(length: int, salt: int) -> list[int]:
    return [(5 * place * place + 11 * place + 37 * salt) % 600 + 5 for place in range(length)]


def parted(clean: Seen, other: Seen) -> Iterator[int]:
    """The reads at which some rank's residual is another; behind them one more for the logits."""
    for index, (ours, theirs) in enumerate(
        zip([*clean.reads, clean.logits], [*other.reads, other.logits], strict=True)
    ):
        if not _same(ours, theirs):
            yield index


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether ranks hold the same, as far as both runs let them hold it."""
    scale = max(float(x.nan_to_num().abs().max()) for x in ours if x.numel())
    return all(
        a.shape == b.shape and bool(((a - b).nan_to_num().abs() <= 1e-4 * scale).all())
        for a, b in zip(ours, theirs, strict=True)
    )


def writers(model: CausalLM, read: int) -> set[str]:
    """The kinds of block that wrote between a read and the one before.

    The last read may have been of other rows than the lm_head should get; behind it is the lm_head.
    """
    reads = model.chain.reads
    if read == 0:
        return {model.embedding.spec.kind}
    last = {model.lm_head.spec.kind} if read == len(reads) - 1 else set()
    return last | {block.kind for block in reads[read - 1].consumers}
