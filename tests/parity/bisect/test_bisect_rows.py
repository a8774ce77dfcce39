"""Whole rows from what ranks hold, and what tells a defect from rounding."""

import json
import math

import pytest
import torch

from isomoe.config import EngineConfig
from isomoe.engine.instrument import load_instrument
from isomoe.errors import ConfigError
from isomoe.layout import MACHINES, Parallelism, TokenRows, make_plan
from isomoe.models import build, read_config
from isomoe.parity.bisect import Bisection, Kind, Point
from isomoe.parity.bisect.assemble import Recording, RecordingError, assemble
from isomoe.parity.bisect.compare_rows import Apart, best_scale, nearest
from isomoe.parity.bisect.floor import Floor
from isomoe.parity.bisect.passes import Pass
from isomoe.parity.bisect.recorder import Dump, Recorder, jittered
from isomoe.parity.bisect.stations import Station, stations
from isomoe.weights import bundled_checkpoint

TEXTS = [(5, 6, 7), (8, 9)]


def record(layout: str, swapped: bool = False) -> Recording:
    """Two prompts, one in each attention group: what every rank writes of the first experts.

    Row t of the truth is filled with t + 1; addends are equal shares of it.
    """
    model = build(read_config(bundled_checkpoint()), Parallelism.parse(layout))
    mesh = model.seat.mesh
    rows = TokenRows.of(mesh, (3, 2), (4, 2))  # the first group has a padding row
    plan = make_plan(model.chain, MACHINES["cpu"]).regimes[0]
    experts = next(name for name, kind in plan.kinds.items() if kind == "experts")
    assert set(plan.gives[experts]) == {"P"}
    truth = torch.tensor([1.0, 2, 3, 99, 4, 5]).unsqueeze(1).expand(6, 8)
    ids = ([*TEXTS[0], 0], [*TEXTS[1]])
    dumps = [
        Dump(
            rank=rank,
            plan=plan,
            ids=ids[(rank >= mesh.size // 2) != swapped],
            positions=[0, 1, 2, 0] if rank < mesh.size // 2 else [0, 1],
            rows=rows,
            logits_rows=rows.select([[2], [1]]),
            seen={Station(Kind.BLOCK, experts): truth / mesh.size},
        )
        for rank in range(mesh.size)
    ]
    return assemble([dumps], TEXTS)


def test_addends_are_summed_and_padding_is_dropped() -> None:
    recording = record("tp4,dp2,ep2")
    whole = recording.whole(Station(Kind.BLOCK, "model.layers.0.mlp.experts"))
    assert whole.places.tolist() == [0, 1, 2, 3, 4]
    assert whole.x[:, 0].tolist() == [1, 2, 3, 4, 5]


def test_tokens_that_nobody_asked_for_are_an_error() -> None:
    with pytest.raises(RecordingError, match="other tokens"):
        record("tp4,dp2,ep2", swapped=True)


def test_every_block_has_a_station_and_only_moved_rows_a_delivery() -> None:
    for layout, moves in (("tp1", False), ("tp2,dp2,ep2", True)):
        model = build(read_config(bundled_checkpoint()), Parallelism.parse(layout))
        found = list(stations(make_plan(model.chain, MACHINES["cpu"]).regimes[0]))
        assert [one.name for one in found if one.kind is Kind.BLOCK] == [
            block.name for block in model.blocks()
        ]
        assert any(one.kind is Kind.DELIVERY for one in found) == moves


def test_jitter_stays_within_a_unit_in_the_last_place() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    other = jittered(x, torch.bfloat16, seed=1)
    assert other.dtype == x.dtype
    apart = ((other - x).float().abs() / x.float().abs()).max()
    assert 0 < apart <= 1.5 * torch.finfo(torch.bfloat16).eps  # and half a unit of rounding
    assert torch.equal(other, jittered(x, torch.bfloat16, seed=1))


def test_nan_is_farther_than_anything() -> None:
    recording = record("tp2,dp2,ep2")
    whole = recording.whole(Station(Kind.BLOCK, "model.layers.0.mlp.experts"))
    broken = type(whole).of(whole.places, whole.x.clone().fill_(math.nan))
    assert Apart.of(broken, whole).worst == math.inf


def rows_apart(error: list[float], ratio: float = 1.0) -> Apart:
    count = len(error)
    return Apart(
        places=torch.arange(count),
        error=torch.tensor(error),
        ratios=torch.full((count,), ratio),
        spread=torch.zeros(count),
    )


def test_one_row_that_is_routed_otherwise_is_rounding_and_a_scale_of_one_percent_is_not() -> None:
    floor = Floor.of([rows_apart([1e-3] * 50)], 1e-4, None)
    assert floor.exceeded(rows_apart([1e-3] * 49 + [2.0])) is None
    assert floor.exceeded(rows_apart([2e-3] * 50, ratio=1.01)) is not None
    some = floor.exceeded(rows_apart([1e-3] * 30 + [2.0] * 20))
    assert some is not None
    assert int(some.sum()) == 20


def test_of_few_rows_all_must_be_off() -> None:
    floor = Floor.of([rows_apart([1e-3] * 50)], 1e-4, None)
    assert floor.exceeded(rows_apart([1.0, 1.0, 1.0, 1e-3])) is None
    assert floor.exceeded(rows_apart([1.0] * 4)) is not None


def test_a_multiple_and_a_shift_of_rows_are_recognised() -> None:
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor, misfit = best_scale(3 * rows, rows)
    assert factor == pytest.approx(3)
    assert misfit < 1e-9
    assert nearest(rows.roll(1, 0), rows).tolist() == [5, 0, 1, 2, 3, 4]
    assert nearest(torch.ones_like(rows), rows).tolist() == [-1] * 6


def test_each_pass_runs_what_it_says() -> None:
    prompts = [(1, 2, 3, 4), (1, 5, 6)]
    assert Pass.EQUAL.texts(prompts) == [(1, 2, 3), (1, 5, 6)]
    assert Pass.SMALL.texts(prompts) == [(1,), (2,), (3,), (4,), (5,), (6,)]
    assert Pass.ALONE.texts(prompts) == prompts


def test_what_is_not_finite_is_null_in_json() -> None:
    point = Point(
        kind=Kind.READ,
        name="model.norm",
        layer=None,
        block="model.layers.3.mlp.experts",
        block_kind="experts",
        placement="SR",
        median=0.1,
        worst=math.inf,
        floor=0.1,
        ratio=math.nan,
        rows=4,
        rows_off=4,
        is_off=True,
    )
    found = Bisection(
        baseline="tp1", other="tp2", batches=Pass.TOGETHER, rows=4, stations=(point,), culprit=None
    ).to_json()
    assert json.loads(json.dumps(found, allow_nan=False))["curve"][0]["worst"] is None
    assert found["sentence"] == "no station of 1 leaves the noise floor"


def test_several_instruments_are_joined_in_order() -> None:
    recorder = "isomoe.parity.bisect.recorder:Recorder"
    setting = f"{recorder}=/nowhere;isomoe.prove.mutants:double_reduce"
    assert EngineConfig(instrument=setting).instrument == setting
    found = load_instrument(setting)
    assert found is not None
    chain = build(read_config(bundled_checkpoint()), Parallelism.parse("tp2")).chain
    assert found.in_chain(chain) == chain
    assert isinstance(load_instrument(f"{recorder}=/nowhere"), Recorder)
    with pytest.raises(ConfigError, match="'mutants': must be package"):
        EngineConfig(instrument=f"{recorder}=/nowhere;mutants")
