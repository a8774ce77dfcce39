"""The instrument that writes down what passes every station, on each rank.

It must come first in `EngineConfig.instrument`: a defect that is planted after it wraps it, so that
what it sees is what the defect has made of it.
"""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isomoe.blocks import Batch
from isomoe.layout import Chain, Letter, LogitsRows, Move, RegimePlan, TokenRows
from isomoe.models import CausalLM
from isomoe.parity.bisect.passes import Pass
from isomoe.parity.bisect.stations import Kind, Station, head_of, moved
from isomoe.stream import Norm, Normed, ResidualStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """What one rank saw in one step.

    Attributes:
        ids, positions: of the rows of its attention group.
        logits_rows: the rows that should get logits.
        seen: [rows on this rank, hidden] at each station; for the lm_head, logits.
    """

    rank: int
    plan: RegimePlan
    ids: list[int]
    positions: list[int]
    rows: TokenRows
    logits_rows: LogitsRows
    seen: dict[Station, Tensor]


class Recorder:
    """An `engine.Instrument` that records while the file `now` in its folder names a pass.

    Steps come as `PASS/STEP.RANK` in the folder, each a `Dump` that `torch.load` reads.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._pass: Pass | None = None
        self._seen: dict[Station, Tensor] = {}
        self._steps = dict.fromkeys(Pass, 0)

    def in_chain(self, chain: Chain) -> Chain:
        """The model's own."""
        return chain

    def in_model(self, model: CausalLM) -> None:
        """Writes down each forward pass."""
        self._model = model
        forward = model.forward

        def recorded(batch: Batch, stream: ResidualStream) -> Tensor:
            logits = forward(batch, stream)
            if self._pass is not None:
                head = Station(Kind.BLOCK, head_of(stream.plan))
                self._seen[head] = logits.to("cpu", copy=True)
                self._save(self._pass, batch, stream)
            return logits

        model.forward = recorded  # type: ignore[method-assign]

    def in_stream(self, stream: ResidualStream) -> None:
        """Looks at what is written, read and delivered in this step."""
        now = self._folder / "now"
        self._pass = Pass(now.read_text()) if now.exists() else None
        if self._pass is None:
            return
        self._seen = {}
        self._watch_writes(stream, jitter=self._pass is Pass.JITTERED)
        self._watch_reads(stream)

    def _watch_writes(self, stream: ResidualStream, jitter: bool) -> None:
        write, dtype = stream.write, self._model.norm.dtype

        def watched(block: str, x: Tensor) -> None:
            if jitter:
                x = jittered(x, dtype, _seed(stream, block))
            self._see(Station(Kind.BLOCK, block), x)
            write(block, x)

        stream.write = watched  # type: ignore[method-assign]

    def _watch_reads(self, stream: ResidualStream) -> None:
        read, deliver = stream.read, stream.deliver
        plans = iter(stream.plan.reads)
        plan = stream.plan.reads[0]

        def watched(norm: Norm, name: str, rows: LogitsRows | None = None) -> Normed:
            nonlocal plan
            normed = read(norm, name, rows)
            plan = next(plans)
            residual = stream._residual
            assert residual is not None
            self._see(Station(Kind.READ, name), residual)
            self._see(Station(Kind.NORM, name), normed._held[plan.residual])
            return normed

        def delivered(x: Tensor, moves: tuple[Move, ...]) -> Tensor:
            arrived = deliver(x, moves)
            first = moved(plan)[moves[-1].after]
            self._see(Station(Kind.DELIVERY, plan.name, first), arrived)
            return arrived

        stream.read = watched  # type: ignore[method-assign]
        stream.deliver = delivered  # type: ignore[method-assign]

    def _see(self, station: Station, x: Tensor) -> None:
        self._seen[station] = x.to("cpu", copy=True)

    def _save(self, now: Pass, batch: Batch, stream: ResidualStream) -> None:
        dump = Dump(
            rank=batch.rank,
            plan=stream.plan,
            ids=batch.ids.tolist(),
            positions=batch.positions.tolist(),
            rows=batch.rows,
            logits_rows=batch.logits_rows,
            seen=self._seen,
        )
        step = self._steps[now]
        self._steps[now] += 1
        file = self._folder / now / f"{step}.{batch.rank}"
        file.parent.mkdir(exist_ok=True)
        partly = file.with_suffix(f".{batch.rank}.part")
        torch.save(dump, partly)
        os.replace(partly, file)  # whoever finds it finds it whole
        self._seen = {}


def jittered(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """x with every element moved at random, by up to a unit in the last place of `dtype`.

    Source: Monte Carlo arithmetic, Parker (1997).
    """
    random = torch.Generator().manual_seed(seed)
    noise = 2 * torch.rand(x.shape, generator=random) - 1
    return (x.float() * (1 + noise * torch.finfo(dtype).eps).to(x.device)).to(x.dtype)


def _seed(stream: ResidualStream, block: str) -> int:
    """Equal on ranks that hold copies, other for each addend."""
    seat, gives = stream.comm.seat, stream.plan.gives[block]
    addend = [seat.index((axis,)) for axis in gives.where(Letter.P)]
    return zlib.crc32(f"{block} {addend}".encode())
