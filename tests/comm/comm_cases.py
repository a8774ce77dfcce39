"""The contract of a communicator, as calls with inputs and outcomes worked out on plain tensors.

Imported by the tests and by the processes that they start.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isomoe.comm import Communicator, torch_communicator
from isomoe.layout import Axes, Mesh, Parallelism, Seat
from support import coordinates, group_of, runs

MESHES = {
    2: Mesh.of(Parallelism(tp_size=2)),
    3: Mesh.of(Parallelism(tp_size=3, attn_dp_size=3)),
    4: Mesh.of(Parallelism(tp_size=4, attn_dp_size=2)),  # axes (2, 2)
}
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
COUNTS = {
    "equal": (2, 2, 2, 2),
    "ragged": (3, 1, 4, 2),
    "empty ranks": (0, 3, 0, 1),
    "all empty": (0,) * 4,
}
"""Rows of each member; a smaller group takes the first ones."""


@dataclass(frozen=True)
class Case:
    """One collective.

    Attributes:
        given: what the member at a place of a group of some size brings.
        call: the collective.
        expected: what each member must hold, from what all of them brought.
        replicated: whether all members must hold the same bits.
    """

    name: str
    given: Callable[[int, int], Tensor]
    call: Callable[[Communicator, Axes, int, Tensor], Tensor]
    expected: Callable[[Sequence[Tensor]], list[Tensor]]
    replicated: bool = False


def drawn(shape: Sequence[int], dtype: torch.dtype, place: int) -> Tensor:
    """Values that differ between members, and whose sum depends on its order in floats."""
    generator = torch.Generator().manual_seed(1000 + place)
    if dtype == torch.int64:
        return torch.randint(-(2**40), 2**40, tuple(shape), generator=generator)
    return (torch.randn(tuple(shape), generator=generator) * 10.0 ** (place % 3)).to(dtype)


def in_rank_order(tensors: Sequence[Tensor]) -> Tensor:
    """The sum that the contract promises: the first member's first, rounded after each addend."""
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total = (total + tensor).to(tensors[0].dtype)
    return total


def shared_sum(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [in_rank_order(tensors)] * len(tensors)


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        tail = str(dtype).removeprefix("torch.")
        # 64 KiB is where an all-reduce over Gloo changes its algorithm; 7 and 12289 divide nothing.
        for shape in ((5, 3), (7,), (2, 3, 4), (0, 3), (12289, 3)):
            yield Case(
                f"all_reduce {shape} {tail}",
                lambda place, n, s=shape, d=dtype: drawn(s, d, place),
                lambda comm, axes, n, x: comm.all_reduce(x, axes),
                shared_sum,
                replicated=True,
            )
        yield Case(
            f"all_reduce of a transposed view {tail}",
            lambda place, n, d=dtype: drawn((3, 5), d, place).t(),
            lambda comm, axes, n, x: comm.all_reduce(x, axes),
            shared_sum,
            replicated=True,
        )
        for kind, counts in COUNTS.items():
            for width in ((3,), (), (2, 2)):
                yield from row_cases(f"{kind} {width} {tail}", counts, width, dtype)
        yield from uneven_all_to_all(tail, dtype)
        yield Case(
            f"broadcast {tail}",
            lambda place, n, d=dtype: drawn((4, 2), d, place),
            lambda comm, axes, n, x: comm.broadcast(x, axes),
            lambda tensors: [tensors[0]] * len(tensors),
            replicated=True,
        )


def row_cases(
    name: str, counts: tuple[int, ...], width: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Case]:
    yield Case(
        f"all_gather {name}",
        lambda place, n: drawn((counts[place], *width), dtype, place),
        lambda comm, axes, n, x: comm.all_gather(x, axes, counts[:n]),
        lambda tensors: [torch.cat(list(tensors))] * len(tensors),
        replicated=True,
    )

    def parts(tensors: Sequence[Tensor]) -> list[Tensor]:
        starts = [sum(counts[:i]) for i in range(len(tensors))]
        total = in_rank_order(tensors)
        return [total[at : at + n] for at, n in zip(starts, counts, strict=False)]

    yield Case(
        f"reduce_scatter {name}",
        lambda place, n: drawn((sum(counts[:n]), *width), dtype, place),
        lambda comm, axes, n, x: comm.reduce_scatter(x, axes, counts[:n]),
        parts,
    )


def uneven_all_to_all(tail: str, dtype: torch.dtype) -> Iterator[Case]:
    """Member i sends (i + 2 j) % 4 rows to member j: zero rows among them."""

    def sent(i: int, j: int) -> int:
        return (i + 2 * j) % 4

    def outcome(tensors: Sequence[Tensor]) -> list[Tensor]:
        n = len(tensors)
        received = []
        for j in range(n):
            rows = []
            for i in range(n):
                first = sum(sent(i, before) for before in range(j))
                rows.append(tensors[i][first : first + sent(i, j)])
            received.append(torch.cat(rows))
        return received

    yield Case(
        f"all_to_all uneven {tail}",
        lambda place, n: drawn((sum(sent(place, j) for j in range(n)), 3), dtype, place),
        lambda comm, axes, n, x: comm.all_to_all(
            x,
            axes,
            [sent(comm.seat.index(axes), j) for j in range(n)],
            [sent(i, comm.seat.index(axes)) for i in range(n)],
        ),
        outcome,
    )


def groups_along(mesh: Mesh, axes: Axes) -> list[list[int]]:
    """The groups over `axes`, from coordinates."""
    found = [group_of(mesh.axes, rank, axes) for rank in range(len(coordinates(mesh.axes)))]
    return [group for rank, group in enumerate(found) if group[0] == rank]


def run_all(comm: Communicator) -> dict[str, Tensor]:
    """Every case over every run of axes on one rank; fails if an input was changed."""
    results = {}
    mesh, rank = comm.seat.mesh, comm.seat.rank
    for axes in runs(len(mesh.axes)):
        group = group_of(mesh.axes, rank, axes)
        for case in cases():
            x = case.given(group.index(rank), len(group))
            before = x.clone()
            result = case.call(comm, axes, len(group), x)
            assert torch.equal(x, before), f"{case.name} changed its input"
            if result.numel():
                assert result.data_ptr() != x.data_ptr(), f"{case.name} returned its input"
            results[f"{axes} {case.name}"] = result.clone()
    return results


def gloo_rank(rank: int, world_size: int, folder: str) -> None:
    """One process: runs all cases over Gloo and saves what it got."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    mesh = MESHES[world_size]
    comm = torch_communicator(Seat(mesh, rank), runs(len(mesh.axes)))
    torch.save(run_all(comm), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
