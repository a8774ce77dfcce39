"""Collectives between real processes, and what a fit makes of readings whose rates are known."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isomoe.models
from isomoe.bench.comm import MeasuredLink, MeasuredSums, Misses, fit, fit_fused, make_norm
from isomoe.bench.comm_plans import PickSummary, picks
from isomoe.blocks.norm import RMSNorm
from isomoe.cli.main import main
from isomoe.comm.base import AddNorm, Communicator
from isomoe.comm.measure import (
    FUSED_BYTES,
    OPS,
    SUMS,
    CommSettings,
    Reading,
    measure,
    unfused,
)
from isomoe.comm.torch_comm import GlooComm
from isomoe.errors import IsomoeError
from isomoe.layout import (
    MACHINES,
    FittedLink,
    FusedSums,
    Machine,
    Op,
    Rate,
    Rates,
    read_share,
)
from isomoe.layout.cost import FILES
from isomoe.models import read_config
from isomoe.weights import bundled_checkpoint

CONFIGS = Path(isomoe.models.__file__).parent / "configs"
MODEL = ["--model-path", str(CONFIGS / "qwen3-30b-a3b.json")]
"""Whose rows have 2,048 values."""
RATES = Rates(
    all_reduce=Rate(alpha_us=10.0, bytes_per_us=200_000.0),
    reduce_scatter=Rate(alpha_us=11.0, bytes_per_us=210_000.0),
    all_gather=Rate(alpha_us=12.0, bytes_per_us=190_000.0),
    exchange=Rate(alpha_us=9.0, bytes_per_us=170_000.0),
)
SLOWER = Rates(
    **{
        op.value: replace(getattr(RATES, op.value), alpha_us=50.0 + 5 * at)
        for at, op in enumerate(OPS)
    }
)
LINK = FittedLink(equal=RATES, ragged=SLOWER)
"""Replayed collectives; and those that the host launches, which take longer."""
SUMS_FUSED = FusedSums(
    whole=Rate(alpha_us=3.0, bytes_per_us=300_000.0),
    scattered=Rate(alpha_us=4.0, bytes_per_us=250_000.0),
    host_us=15.0,
    max_bytes=FUSED_BYTES,
)


def fused_readings(sums: FusedSums = SUMS_FUSED) -> list[Reading]:
    """The same of fused sums, of rows of 2,048 values in two bytes."""
    found = []
    for op in SUMS:
        for members in (2, 4):
            for rows in (1, 4, 64, 1024):
                read = rows * 4096.0 * read_share(op, members)
                for equal, replayed in ((True, True), (True, False), (False, False)):
                    norm_us = 1.0 + rows / 500 if replayed else 60.0
                    found.append(
                        Reading(
                            op=op,
                            members=members,
                            equal=equal,
                            replayed=replayed,
                            rows=rows,
                            sent_bytes=read,
                            us=norm_us + sums.microseconds(op, replayed, members, read),
                            fused=True,
                            norm_us=norm_us,
                        )
                    )
    return found


def readings(link: FittedLink = LINK) -> list[Reading]:
    """What a GPU machine that is exactly so would show, and equal ones that the host launches."""
    found = []
    for op in OPS:
        for members in (2, 4):
            for rows in (1, 4, 64, 1024, 8192):
                sent = rows * 4096.0
                for equal, replayed in ((True, True), (True, False), (False, False)):
                    us = link.microseconds(op, replayed, members, sent)
                    found.append(
                        Reading(
                            op=op,
                            members=members,
                            equal=equal,
                            replayed=replayed,
                            rows=rows,
                            sent_bytes=sent,
                            us=us,
                        )
                    )
    return found


def test_a_fit_finds_the_rates_that_readings_were_made_with() -> None:
    found = fit(readings())
    for form, expected in (("equal", RATES), ("ragged", SLOWER)):
        for op in OPS:
            rate, true = getattr(getattr(found, form), op.value), getattr(expected, op.value)
            assert rate.alpha_us == pytest.approx(true.alpha_us, abs=0.01)
            assert rate.bytes_per_us == pytest.approx(true.bytes_per_us, rel=1e-3)
    assert Misses.of(found, readings()).worst < 1.001


def test_a_fit_of_fused_sums_finds_what_they_take_beyond_the_norm() -> None:
    both = [*fused_readings(), *readings()]
    found = fit_fused(both)
    for name in ("whole", "scattered"):
        rate, true = getattr(found, name), getattr(SUMS_FUSED, name)
        assert rate.alpha_us == pytest.approx(true.alpha_us, abs=0.01)
        assert rate.bytes_per_us == pytest.approx(true.bytes_per_us, rel=1e-3)
    assert found.host_us == SUMS_FUSED.host_us
    assert found.max_bytes == FUSED_BYTES
    assert Misses.of(found, both, fused=True).worst < 1.001
    assert fit(both) == fit(readings()), "the collectives' fit does not see them"


def test_a_norm_that_the_host_launches_as_slowly_as_a_fused_sum_costs_nothing_beyond() -> None:
    hidden = [replace(one, us=one.norm_us - 1.0) for one in fused_readings() if not one.replayed]
    replayed = [one for one in fused_readings() if one.replayed]
    assert fit_fused([*replayed, *hidden]).host_us == 0.0


def test_fused_sums_as_measured_are_less_the_norm() -> None:
    measured = MeasuredSums.of(fit_fused(fused_readings()), fused_readings())
    for one in fused_readings():
        if one.equal == one.replayed:
            us = measured.microseconds(one.op, one.equal, one.members, one.sent_bytes)
            assert us == pytest.approx(one.us - one.norm_us)


def test_a_prediction_that_is_half_of_the_reading_is_off_by_two() -> None:
    double = [replace(one, us=2 * one.us) for one in readings()]
    assert Misses.of(LINK, double) == Misses(median=2.0, worst=2.0)


def test_readings_that_do_not_grow_make_no_rate_negative() -> None:
    falling = [replace(one, us=100.0 - one.rows / 1e3) for one in readings()]
    for rates in (fit(falling).equal, fit(falling).ragged):
        for op in OPS:
            rate = getattr(rates, op.value)
            assert min(rate.alpha_us, rate.bytes_per_us) > 0


def test_between_readings_is_a_straight_line_and_beyond_them_the_last_slope() -> None:
    link = MeasuredLink(readings())
    ends = [link.microseconds(Op.ALL_GATHER, True, 2, rows * 4096.0) for rows in (64, 544, 1024)]
    assert ends[1] == pytest.approx((ends[0] + ends[2]) / 2)
    least = link.microseconds(Op.ALL_GATHER, True, 2, 4096.0)
    assert link.microseconds(Op.ALL_GATHER, True, 2, 0.0) == least
    far = link.microseconds(Op.ALL_GATHER, True, 2, 1e9)
    assert far == pytest.approx(RATES.all_gather.alpha_us + 1e9 / RATES.all_gather.bytes_per_us)


def test_a_planner_that_knows_the_truth_loses_nothing_and_one_that_does_not_loses() -> None:
    config = read_config(bundled_checkpoint())
    cuda = replace(MACHINES["cuda"], fused=None)
    truth = replace(cuda, within=MeasuredLink(readings()))
    known = list(picks(config, 4, replace(cuda, within=LINK), truth, (8, 4096)))
    assert known
    # 1e-3: between two readings a straight line is the truth, below the first it is not.
    assert max(pick.loss for pick in known) < 1e-3
    # All-reduce looks free, so that everything is summed by it.
    free = replace(RATES, all_reduce=Rate(alpha_us=0.1, bytes_per_us=1e9))
    wrong = replace(cuda, within=FittedLink(equal=free, ragged=free))
    assert max(pick.loss for pick in picks(config, 4, wrong, truth, (8, 4096))) > 0.1


def test_fused_sums_are_picked_by_what_they_take_or_as_declined_where_there_are_none() -> None:
    config = read_config(bundled_checkpoint())
    known = replace(MACHINES["cuda"], within=LINK, fused=SUMS_FUSED)
    sums = MeasuredSums.of(SUMS_FUSED, fused_readings())
    truth = replace(known, within=MeasuredLink(readings()), fused=sums)

    def lost(machine: Machine, truth: Machine) -> float:
        return max(pick.loss for pick in picks(config, 4, machine, truth, (8, 4096)))

    assert lost(known, truth) < 1e-3
    assert lost(replace(known, fused=None), truth) > 0.5
    # Where there are none, the sums are made all the same, and behind them nothing changes.
    assert 0.0 < lost(known, replace(truth, fused=None)) < 1.0


def test_a_machine_comes_back_from_its_file(tmp_path: Path) -> None:
    fused = replace(MACHINES["cuda"], within=LINK, fused=SUMS_FUSED)
    for machine in (*MACHINES.values(), fused, replace(fused, fused=None)):
        machine.save(tmp_path / "machine.json")
        assert Machine.load(tmp_path / "machine.json") == machine


def test_every_collective_is_measured_between_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "comm.json"
    flags = ["bench", "comm", "--device", "cpu"]
    code = main([*flags, "--ranks", "2", "--rows", "1", "8", "64", "--json", str(document)])
    assert code == 0
    told = capsys.readouterr().out
    assert "predictions after" in told
    assert "no fused sums: they are made between GPUs" in told
    found = [Reading.of(one) for one in json.loads(document.read_text())["readings"]]
    kinds = {(one.op, one.equal, one.rows) for one in found}
    assert {kind for kind in kinds if kind[0] is not Op.ALL_REDUCE and not kind[1]} == {
        (op, False, rows) for op in OPS[1:] for rows in (1, 8, 64)
    }
    assert {kind for kind in kinds if kind[1]} == {
        (op, True, rows) for op in OPS for rows in (1, 8, 64) if op is Op.ALL_REDUCE or rows > 1
    }
    assert all(one.us > 0 and not one.replayed and not one.fused for one in found)
    # The readings can be fitted again, but not for a model with other rows.
    machine = tmp_path / "machine.json"
    assert main([*flags, "--from", str(document), "--save", str(machine)]) == 0
    kept = Machine.load(machine)
    assert kept == replace(
        MACHINES["cpu"], within=fit(found), fused=None, measured_on=kept.measured_on
    )
    assert kept != MACHINES["cpu"]
    assert main([*flags, "--from", str(document), *MODEL]) == 2
    assert "rows of 256 values" in capsys.readouterr().err


def document_of(readings: list[Reading]) -> dict[str, object]:
    """Of 4 GPUs with symmetric memory."""
    return {
        "readings": [one.to_json() for one in readings],
        "settings": {"ranks": 4, "device": "cuda", "row_values": 2048},
        "device": {"name": "a card"},
        "date": "2026-11-27",
        "no_fused_sums": None,
    }


def test_the_machine_that_is_kept_needs_no_further_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [*readings(), *fused_readings()]
    document, machine = tmp_path / "comm.json", tmp_path / "machine.json"
    document.write_text(json.dumps(document_of(every)))
    flags = ["--from", str(document), "--save", str(machine)]
    shipped = (FILES / "cuda.json").read_text()
    assert main(["bench", "comm", *MODEL, *flags]) == 0
    told = capsys.readouterr().out
    assert "predictions of fused sums after: off by 1.00x in the median, 1.0x at worst" in told
    assert Machine.load(machine) == replace(
        MACHINES["cuda"],
        within=fit(every),
        fused=fit_fused(every),
        measured_on="4 x a card, 2026-11-27",
    )
    assert (FILES / "cuda.json").read_text() == shipped


def test_where_no_sum_is_fused_the_machine_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, machine = tmp_path / "comm.json", tmp_path / "machine.json"
    document.write_text(json.dumps({**document_of(readings()), "no_fused_sums": "for a reason"}))
    flags = ["--from", str(document), "--save", str(machine)]
    assert main(["bench", "comm", *MODEL, *flags]) == 0
    assert "no fused sums: for a reason" in capsys.readouterr().out
    assert json.loads(machine.read_text())["fused"] is None


def test_readings_without_fused_sums_are_not_kept_as_if_there_were_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be older than the measurement of those, or some may have been lost."""
    file, machine = tmp_path / "comm.json", tmp_path / "machine.json"
    older = document_of(readings())
    del older["no_fused_sums"]
    for document, complaint in (
        (older, "from before fused sums were measured"),
        (document_of(readings()), "readings of fused sums are missing"),
        (
            document_of([*readings(), *(one for one in fused_readings() if one.members == 2)]),
            "readings of fused sums are missing",
        ),
    ):
        file.write_text(json.dumps(document))
        flags = ["--from", str(file), "--save", str(machine)]
        assert main(["bench", "comm", *MODEL, *flags]) == 2
        assert complaint in capsys.readouterr().err
    assert not machine.exists()
    # An older one can still be looked at.
    file.write_text(json.dumps(older))
    assert main(["bench", "comm", *MODEL, "--from", str(file)]) == 0
    assert "no fused sums: these readings are from before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "found", "reason"),
    [
        ({"device": "cpu"}, readings(), "they are made between GPUs"),
        ({}, [one for one in readings() if not one.replayed], "share a GPU"),
        ({"row_values": 12}, readings(), "rows of 12 values are not taken; multiples of 8 up to"),
        ({"rows": (4, 4096)}, readings(), "two of --rows are multiples of 4 and at most 2048"),
        ({}, readings(), "not all GPUs have symmetric memory"),
        ({}, [*readings(), *(o for o in fused_readings() if o.members == 2)], "not all GPUs"),
        ({}, [*readings(), *fused_readings()], None),
    ],
)
def test_why_there_are_no_fused_sums_is_said(
    changed: dict[str, Any], found: list[Reading], reason: str | None
) -> None:
    whole = CommSettings(ranks=4, device="cuda", row_values=2048, rows=(1, 4, 64, 1024))
    told = unfused(replace(whole, **changed), found)
    assert told == reason if reason is None else reason in (told or "")


def fuse(row_values: int, dtype: torch.dtype, device: torch.device) -> RMSNorm:
    """In each rank: Gloo, too, fuses sums from now on, of up to 8 rows."""

    def sum_add_norm(
        self: Communicator,
        x: Tensor,
        axes: tuple[int, ...],
        counts: Sequence[int] | None,
        residual: Tensor,
        norm: AddNorm,
    ) -> tuple[Tensor, Tensor] | None:
        if len(x) > 8:
            return None
        whole = self.all_reduce(x, axes)
        mine = self.seat.index(axes)
        first = sum((counts or [])[:mine])
        total = whole if counts is None else whole[first : first + counts[mine]]
        assert total.shape == residual.shape
        return norm.after_adding(residual, total)

    GlooComm.sum_add_norm = sum_add_norm  # type: ignore[method-assign]
    return make_norm(row_values, dtype, device)


def test_sums_are_measured_fused_where_ranks_can_and_beside_the_norm_alone() -> None:
    settings = CommSettings(ranks=2, device="cpu", row_values=16, rows=(1, 2, 8, 64))
    found = list(measure(settings, fuse))
    fused = {(one.op, one.equal, one.rows): one for one in found if one.fused}
    assert fused.keys() == {
        (op, equal, rows)
        for op in SUMS
        for equal in (True, False)
        for rows in (1, 2, 8)
        if (op is Op.REDUCE_SCATTER or equal) and (op is Op.ALL_REDUCE or not equal or rows > 1)
    }
    for (op, _, rows), one in fused.items():
        assert one.us > one.norm_us > 0.0
        assert one.sent_bytes == rows * 64 / (1 if op is Op.ALL_REDUCE else 2)
    assert all(one.norm_us == 0.0 for one in found if not one.fused)
    assert unfused(settings, found) is None


def test_documents_that_are_none_or_say_nothing_of_gpus_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A staged measurement must not be kept as that of the links between GPUs."""
    staged = [replace(one, replayed=False) for one in readings() if not one.replayed]
    whole = {
        "readings": [one.to_json() for one in staged],
        "settings": {"ranks": 4, "device": "cuda", "row_values": 256},
        "device": {"name": "a card"},
        "date": "2026-11-27",
    }
    kept = MACHINES["cuda"]
    for document, flags, complaint in (
        (whole, ["--save"], "shared GPUs"),
        ({**whole, "readings": []}, [], "readings of a collective are missing"),
        ({**whole, "settings": {}}, [], "no document"),
        ({**whole, "settings": {**whole["settings"], "device": "tpu"}}, [], "no document"),
        ([], [], "no document"),
    ):
        file = tmp_path / "comm.json"
        file.write_text(json.dumps(document))
        assert main(["bench", "comm", "--from", str(file), *flags]) == 2
        assert complaint in capsys.readouterr().err
    assert Machine.load(FILES / "cuda.json") == kept


def test_as_many_ranks_as_no_layout_has_leave_nothing_to_pick() -> None:
    config = read_config(bundled_checkpoint())
    assert PickSummary.of(picks(config, 3, MACHINES["cuda"], MACHINES["cuda"], (8,))) is None


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_measurement_in_one_line() -> None:
    nonsense = CommSettings(ranks=2, device="no-such-device", row_values=8, rows=(2,))
    with pytest.raises(IsomoeError, match="a rank of the measurement failed: RuntimeError"):
        list(measure(nonsense, make_norm))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--ranks", "1"], "--ranks 1: must be 2 to"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--ranks", "4", "--rows", "2", "8"], "two of them multiples of 4"),
        (["--from", "nowhere.json"], "--from nowhere.json: no document"),
    ],
)
def test_bad_flags_are_named(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "comm", "--device", "cpu", *flags]) == 2
    assert complaint in capsys.readouterr().err
