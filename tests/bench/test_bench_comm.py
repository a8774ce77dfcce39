"""Collectives between real processes, and what a fit makes of readings whose rates are known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import isomoe.models
from isomoe.bench.comm import MeasuredLink, Misses, fit
from isomoe.bench.comm_plans import PickSummary, picks
from isomoe.cli.main import main
from isomoe.comm.measure import OPS, CommSettings, Reading, measure
from isomoe.errors import IsomoeError
from isomoe.layout import MACHINES, FittedLink, Machine, Op, Rate, Rates
from isomoe.layout.cost import FILES
from isomoe.models import read_config
from isomoe.weights import bundled_checkpoint

CONFIGS = Path(isomoe.models.__file__).parent / "configs"
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
    truth = MeasuredLink(readings())
    cuda = MACHINES["cuda"]
    known = list(picks(config, 4, replace(cuda, within=LINK), truth, (8, 4096)))
    assert known
    # 1e-3: between two readings a straight line is the truth, below the first it is not.
    assert max(pick.loss for pick in known) < 1e-3
    # All-reduce looks free, so that everything is summed by it.
    free = replace(RATES, all_reduce=Rate(alpha_us=0.1, bytes_per_us=1e9))
    wrong = replace(cuda, within=FittedLink(equal=free, ragged=free))
    assert max(pick.loss for pick in picks(config, 4, wrong, truth, (8, 4096))) > 0.1


def test_a_machine_comes_back_from_its_file(tmp_path: Path) -> None:
    for machine in MACHINES.values():
        machine.save(tmp_path / "machine.json")
        assert Machine.load(tmp_path / "machine.json") == machine


def test_every_collective_is_measured_between_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "comm.json"
    flags = ["bench", "comm", "--device", "cpu"]
    code = main([*flags, "--ranks", "2", "--rows", "1", "8", "64", "--json", str(document)])
    assert code == 0
    assert "predictions after" in capsys.readouterr().out
    found = [Reading.of(one) for one in json.loads(document.read_text())["readings"]]
    kinds = {(one.op, one.equal, one.rows) for one in found}
    assert {kind for kind in kinds if kind[0] is not Op.ALL_REDUCE and not kind[1]} == {
        (op, False, rows) for op in OPS[1:] for rows in (1, 8, 64)
    }
    assert {kind for kind in kinds if kind[1]} == {
        (op, True, rows) for op in OPS for rows in (1, 8, 64) if op is Op.ALL_REDUCE or rows > 1
    }
    assert all(one.us > 0 and not one.replayed for one in found)
    # The readings can be fitted again, but not for a model with other rows.
    assert main([*flags, "--from", str(document)]) == 0
    other = ["--model-path", str(CONFIGS / "qwen3-30b-a3b.json")]
    assert main([*flags, "--from", str(document), *other]) == 2
    assert "rows of 256 values" in capsys.readouterr().err


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
    assert (
        PickSummary.of(picks(config, 3, MACHINES["cuda"], MeasuredLink(readings()), (8,))) is None
    )


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_measurement_in_one_line() -> None:
    nonsense = CommSettings(ranks=2, device="no-such-device", row_values=8, rows=(2,))
    with pytest.raises(IsomoeError, match="a rank of the measurement failed: RuntimeError"):
        list(measure(nonsense))


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
