"""The report on a terminal: one table, then what to know of each target."""

from collections.abc import Iterator

from rich import markup
from rich.console import Console
from rich.table import Table

from isomoe.parity.compare import Summary
from isomoe.parity.report.model import Report
from isomoe.parity.report.words import UNKNOWN, number, odds, one_line, share, times
from isomoe.parity.verdict import Row, Verdict

WIDE = 120
"""Columns from which the table has all its own."""
_WIDTH = 160
"""Columns where stdout is no terminal."""

_COLOURS = {
    Verdict.IDENTICAL: "green",
    Verdict.AGREES: "green",
    Verdict.DIFFERS: "red",
    Verdict.NOT_COMPARED: "yellow",
}


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints it.

    Args:
        console: stdout's if not given; 160 columns wide where that is no terminal.
    """
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_WIDTH)
    console.print(_opening(report), soft_wrap=not console.is_terminal)
    console.print(_table(report, console.width))
    for remark in _remarks(report):
        console.print(remark, soft_wrap=not console.is_terminal)


def _opening(report: Report) -> str:
    baseline = report.baseline
    what = ", ".join(
        str(found) for key in ("model", "dtype", "device") if (found := baseline.facts.get(key))
    )
    return _escape(
        f"{what or baseline.dialect}: {len(baseline.outputs)} prompts ({report.source}), "
        f"{baseline.num_tokens} tokens decoded greedily by the baseline {baseline.name} "
        f"(mean logprob {number(baseline.mean_logprob)}, {baseline.seconds:.1f} s)"
    )


def _table(report: Report, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    is_wide = width >= WIDE
    table.add_column("target", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    forced = "teacher-forced |Δ|"
    titles = ["same\ntokens", f"{forced}\nmean / max", "effect"]
    if is_wide:
        titles = ["same\nprompts", "same\ntokens", "decoded |Δ|\nmean / max"]
        titles += [f"{forced}\nmean / p99 / max", "KL", "rank 1", "effect", "by chance"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(*_cells(row, is_wide))
    floor = report.floor_summary
    if floor is not None:
        blank = ["", "", "", "", _wide(floor)] if is_wide else ["", "", _narrow(floor)]
        table.add_row("[dim]noise floor[/]", *blank)
    return table


def _cells(row: Row, is_wide: bool) -> list[str]:
    comparison, judgement = row.comparison, row.judgement
    colour = _COLOURS[judgement.verdict]
    prompts, tokens = len(comparison.prompts), comparison.baseline.num_tokens
    same_tokens = f"{comparison.common_tokens}/{tokens}" if prompts else UNKNOWN
    cells = [_escape(comparison.other.name), f"[{colour}]{judgement.verdict}[/]"]
    if not is_wide:
        return [*cells, same_tokens, _narrow(comparison.forced), times(judgement.effect)]
    return [
        *cells,
        f"{comparison.same_prompts}/{prompts}" if prompts else UNKNOWN,
        same_tokens,
        _narrow(comparison.free),
        _wide(comparison.forced),
        number(comparison.kl),
        share(comparison.top1),
        times(judgement.effect),
        odds(judgement.chance),
    ]


def _narrow(summary: Summary | None) -> str:
    if summary is None or not summary.tokens:
        return UNKNOWN
    return f"{number(summary.mean)} / {number(summary.most)}"


def _escape(text: str) -> str:
    """A text of ours or a server's as it is: neither markup nor anything that a terminal obeys."""
    return markup.escape(one_line(text))


def _wide(summary: Summary | None) -> str:
    if summary is None or not summary.tokens:
        return UNKNOWN
    return f"{number(summary.mean)} / {number(summary.p99)} / {number(summary.most)}"


def _remarks(report: Report) -> Iterator[str]:
    yield from (f"Baseline: {_escape(note)}" for note in report.baseline.notes)
    for row in report.rows:
        other = row.comparison.other
        reasons = (reason.removeprefix(f"{other.name}: ") for reason in row.judgement.reasons)
        said = [*reasons, *report.remarks(row)]
        for index, one in enumerate(map(_escape, said)):
            yield f"  {one}" if index else f"[bold]{_escape(other.name)}[/]: {one}"
    for bisection in report.bisections:
        found = bisection.to_json()
        yield f"[bold]{_escape(found['other'])}[/], layer by layer: {_escape(found['sentence'])}"
    yield from (f"Noise floor: {_escape(note)}" for note in report.noise.notes)
    if not report.noise.is_measured:
        yield "The noise floor was not measured."
    yield (
        "Δ: difference of log-probabilities in nats. Same: before the first difference of "
        "two greedy decodes. Teacher-forced: the baseline's tokens, prefill against prefill."
    )
    limits = {
        f"{name} |Δ|": value
        for name, value in (("mean", report.thresholds.mean), ("max", report.thresholds.max))
        if value is not None
    }
    if limits:
        pinned = ", ".join(f"{name} {value:g}" for name, value in limits.items())
        yield f"Pinned limits: {pinned}."
    else:
        yield f"False-alarm rate: {odds(report.thresholds.false_alarm)}."
