"""Where a mutant of the residual stream acts (sites), and how it gets in (hooks)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from isomoe.layout import Axes, Move, Op, RegimePlan, Settle
from isomoe.stream import ResidualStream

REDUCING = (Op.ALL_REDUCE, Op.REDUCE_SCATTER)

Site = Callable[[RegimePlan, str], bool]
"""Whether a mutant acts on what a block writes under a plan."""

Hook = Callable[[ResidualStream], None]
Run = Callable[[Tensor, Move], Tensor]
OnMove = Callable[[ResidualStream, Run, Tensor, Move], Tensor]
OnWrite = Callable[[ResidualStream, str, Tensor], Tensor]


def of(*kinds: str) -> Site:
    """Blocks of these kinds."""
    return lambda plan, block: plan.kinds[block] in kinds


def ragged(plan: RegimePlan, block: str) -> bool:
    """Steps of unequal attention-DP groups (what SGLang pads by SUM_LEN)."""
    return not plan.regime.equal


def equal(plan: RegimePlan, block: str) -> bool:
    """Steps of equal attention-DP groups (what SGLang pads by MAX_LEN)."""
    return plan.regime.equal


def small(plan: RegimePlan, block: str) -> bool:
    """Steps of the smallest bucket, as decode is; others are prefill, or many requests."""
    return plan.regime.rows <= 8


def large(plan: RegimePlan, block: str) -> bool:
    """Steps of all but the smallest bucket."""
    return not small(plan, block)


def last_layer(plan: RegimePlan, block: str) -> bool:
    """Blocks between the last two norms."""
    return any(block in settle.producers for settle in plan.reads[-1].settles)


def both(*sites: Site) -> Site:
    """All of these at once."""
    return lambda plan, block: all(site(plan, block) for site in sites)


def on_write(site: Site, change: OnWrite) -> Hook:
    """Passes what blocks of a site write through `change`."""

    def in_stream(stream: ResidualStream) -> None:
        write = stream.write

        def mutated(block: str, x: Tensor) -> None:
            write(block, change(stream, block, x) if site(stream.plan, block) else x)

        stream.write = mutated  # type: ignore[method-assign]

    return in_stream


def _unfuse(stream: ResidualStream) -> None:
    """Makes every sum a move of its own, so that a mutant of moves meets all of them."""

    def plain(settle: Settle) -> Settle:
        return replace(settle, route=replace(settle.route, fused=False))

    stream._reads = iter(
        [replace(read, settles=tuple(map(plain, read.settles))) for read in stream.plan.reads]
    )


def on_move(change: OnMove) -> Hook:
    """Passes every move through `change`, which may call the real one."""

    def in_stream(stream: ResidualStream) -> None:
        _unfuse(stream)
        run = stream.move

        def mutated(x: Tensor, move: Move) -> Tensor:
            return change(stream, run, x, move)

        stream.move = mutated  # type: ignore[method-assign]

    return in_stream


def on_settle(site: Site, change: OnMove) -> Hook:
    """Passes the moves that settle what blocks of a site wrote through `change`."""

    def in_stream(stream: ResidualStream) -> None:
        _unfuse(stream)
        settled, run = stream._settled, stream.move

        def other(x: Tensor, move: Move) -> Tensor:
            return change(stream, run, x, move)

        def mutated(settle: Settle, moves: Sequence[Move]) -> Tensor:
            here = any(site(stream.plan, block) for block in settle.producers)
            stream.move = other if here else run  # type: ignore[method-assign]
            try:
                return settled(settle, moves)
            finally:
                stream.move = run  # type: ignore[method-assign]

        stream._settled = mutated  # type: ignore[method-assign]

    return in_stream


def summed_axes(plan: RegimePlan, block: str) -> list[Axes]:
    """The axes over which the stream will sum what a block writes, one run for each move."""
    return [
        move.axes
        for read in plan.reads
        for settle in read.settles
        if block in settle.producers
        for move in settle.route.moves
        if move.op in REDUCING
    ]
