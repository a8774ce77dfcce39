"""What runs beside: forked when its rows are there, joined before the next read settles.

There is no GPU here: streams and events are stand-ins that write down what is asked of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from isomoe import stream as streams
from isomoe.comm import LocalComm
from isomoe.layout import (
    MACHINES,
    BlockSpec,
    Chain,
    Mesh,
    Parallelism,
    Placement,
    ReadSpec,
    Regime,
    Seat,
    TokenRows,
    Variant,
    make_plan,
)
from isomoe.stream import ResidualStream

HERE = Placement("")
ROWS = 4


class OnGpu(Tensor):
    """Claims to lie on a GPU."""

    is_cuda = True


class Norm:
    weight, eps, dtype = torch.ones(2), 0.0, torch.float32

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __call__(self, x: Tensor, /) -> Tensor:
        self.log.append("norm")
        return x.as_subclass(OnGpu)

    def after_adding(self, residual: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + addend
        return total, self(total)


class Stand:
    """A stream and its events in one."""

    device = torch.device("cuda")

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: "Stand") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def block(name: str, beside: bool = False) -> BlockSpec:
    return BlockSpec(name=name, kind=name, variants=(Variant(HERE, HERE),), beside=beside)


def stream_on(second_stream_rows: int) -> ResidualStream:
    mesh = Mesh.of(Parallelism())
    chain = Chain(
        mesh=mesh,
        embedding=BlockSpec(name="embed", kind="embed", variants=(Variant(None, HERE),)),
        reads=(
            ReadSpec(name="one", consumers=(block("experts"), block("shared", beside=True))),
            ReadSpec(name="two", consumers=(block("head"),), selects_rows=True),
        ),
        hidden_size=2,
    )
    machine = replace(MACHINES["cuda"], second_stream_rows=second_stream_rows)
    plan = make_plan(chain, machine, [Regime(rows=8, equal=True)]).regimes[0]
    rows = TokenRows.of(mesh, [ROWS])
    return ResidualStream(plan, LocalComm(Seat(mesh, 0)), rows, torch.float32)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    main, second = Stand("main", found), Stand("second", found)

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        found.append(f"on {stream.name}")
        yield
        found.append("back")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(streams, "second_stream", lambda device: second)
    return found


def run(stream: ResidualStream, log: list[str]) -> Tensor:
    """A step as a model makes it: all rows are delivered before any block runs."""
    norm = Norm(log)
    stream.write("embed", torch.ones(ROWS, 2))
    h = stream.read(norm, "one")
    for name in ("experts", "shared"):
        h.to(name)
    for name, factor in (("experts", 2.0), ("shared", 3.0)):
        with h.beside(name):
            log.append(name)
            out = h.to(name) * factor
        stream.write(name, out)
    last = stream.tokens.select([list(range(ROWS))])
    return stream.read(norm, "two", rows=last).to("head")


def test_it_forks_before_the_others_run_and_joins_before_the_next_norm(log: list[str]) -> None:
    given = run(stream_on(second_stream_rows=8), log)
    assert log == [
        "norm",
        "main records",
        "experts",
        "second waits for event of main",
        "on second",
        "shared",
        "back",
        "main waits for second",
        "norm",
    ]
    assert torch.equal(torch.Tensor(given), torch.full((ROWS, 2), 6.0))


def test_where_it_does_not_pay_nothing_is_forked(log: list[str]) -> None:
    run(stream_on(second_stream_rows=7), log)
    assert log == ["norm", "experts", "shared", "norm"]
