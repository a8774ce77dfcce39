import io
import math
from dataclasses import replace

import pytest
from report_samples import judged, run_of, sample
from rich.console import Console

from isomoe.parity.noise import Noise
from isomoe.parity.report import Report, print_report
from isomoe.parity.verdict import Verdict


def printed(report: Report, width: int, *, terminal: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, highlight=False)
    print_report(report, console)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_the_terminal_and_nothing_is_cut_off(width: int) -> None:
    text = printed(sample(), width, terminal=True)
    plain = printed(sample(), width)
    table = [line for line in plain.splitlines() if line.startswith(("same ", "far ", "gone "))]
    assert len(table) == 3
    assert max(map(len, table)) <= width
    assert "…" not in plain
    assert "\x1b[" in text
    for verdict in Verdict:
        assert verdict in plain
    assert "1,000x" in plain


def test_a_wide_table_has_kl_ranks_and_odds() -> None:
    wide, narrow = printed(sample(), 160), printed(sample(), 80)
    for word in ("KL", "rank 1", "less than 1 in 10^12"):
        assert word in wide
        assert word not in narrow


def test_every_target_has_its_reasons_and_notes() -> None:
    text = printed(sample(), 160)
    assert "far: 1,000 times the floor\n  started with --tp 8\n" in text
    assert "gone: gone: no answer" not in text
    assert "gone: no answer within 60 s" in text
    assert "far, layer by layer: layer 0, experts" in text
    assert "False-alarm rate: 1 in 10,000." in text


def test_markup_in_a_name_is_text() -> None:
    base = run_of("base", 1, 3, 2)
    row = judged(base, replace(base, name="[red]x[/red]"), Verdict.IDENTICAL, "[bold]y")
    text = printed(Report(baseline=base, source="[s]", rows=(row,), noise=Noise.of(base)), 160)
    assert "[red]x[/red]: [bold]y" in text
    assert "([s])" in text


def test_what_is_not_finite_is_a_dash_and_no_0() -> None:
    base = run_of("base", 1, 3, 2)
    place = base.outputs[0][0]
    bad = place._replace(token=place.token._replace(logprob=math.nan))
    texts = ((bad, *base.outputs[0][1:]),)
    other = replace(base, name="other", outputs=texts, scores=texts)
    row = judged(base, other, Verdict.DIFFERS)
    report = Report(baseline=base, source="", rows=(row,), noise=Noise.of(base))
    (line,) = (one for one in printed(report, 160).splitlines() if one.startswith("other "))
    assert "— / — / —" in line
    assert "0 / 0" not in line


def test_no_control_character_reaches_the_terminal() -> None:
    odd = "\x1b[2J\x07\r\n\u202ex\x9b"
    base = replace(run_of(odd, 1, 3, 2), facts={"model": odd}, notes=(odd,))
    row = judged(base, base.with_note(odd), Verdict.DIFFERS, odd)
    report = Report(baseline=base, source=odd, rows=(row,), noise=Noise.of(base))
    found = printed(report, 160)
    assert not any(letter in found for letter in "\x1b\x07\r\u202e\x9b")
    assert "␛[2J" in found


def test_a_floor_that_was_not_measured_is_said_so() -> None:
    base = replace(run_of("base", 1, 3, 2), scores=None)
    row = judged(base, base, Verdict.NOT_COMPARED)
    report = Report(baseline=base, source="sample", rows=(row,), noise=Noise.of(base))
    assert "The noise floor was not measured." in printed(report, 160)
    assert "noise floor  " not in printed(report, 160)


def test_without_a_terminal_stdout_is_160_columns_wide(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_report(sample())
    assert "mean / p99 / max" in capsys.readouterr().out


def test_each_number_stands_in_its_column() -> None:
    report = sample()
    row = report.rows[2].comparison
    assert row.forced is not None
    assert row.free.mean != row.forced.mean
    (line,) = (one for one in printed(report, 160).splitlines() if one.startswith("far "))
    free, forced = row.free, row.forced
    assert f"{free.mean:.3g} / {free.most:.3g}  " in line
    assert f"{forced.mean:.3g} / {forced.p99:.3g} / {forced.most:.3g}  " in line
