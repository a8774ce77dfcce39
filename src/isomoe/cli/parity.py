"""`isomoe parity`: whether servers, engines and layouts are the same model, and where they part."""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from isomoe import __version__
from isomoe.cli.options import add_model_option, add_runtime_options, engine_config_from
from isomoe.cli.progress import progress_bar
from isomoe.errors import ConfigError
from isomoe.layout import Parallelism
from isomoe.parity.prompts import DEFAULT_COUNT

if TYPE_CHECKING:
    from isomoe.engine.model_info import ModelInfo
    from isomoe.parity.bisect import Bisection
    from isomoe.parity.prompts import Prompts
    from isomoe.parity.report import Report
    from isomoe.parity.run import Run
    from isomoe.parity.targets.base import Target
    from isomoe.parity.targets.parse import TargetSettings
    from isomoe.parity.targets.saved import SavedRun
    from isomoe.parity.thresholds import Thresholds
    from isomoe.parity.verdict import Row
    from isomoe.tokenizer import Tokenizer

NAME = "parity"
HELP = (
    "Tell whether two servers, engines or layouts are the same model: decode the same prompts "
    "greedily, score the first one's tokens on every other, and hold the differences against the "
    "first one's own noise. Exit 0 if all agree, 1 if one differs, 2 if one was not compared."
)
_TARGETS = """\
targets, the baseline first:
  tp2,dp2,ep2               this engine on a layout (dp is attention DP)
  tp2,dp2,ep2+double-reduce the same with a known defect planted (--mutants lists them)
  http://127.0.0.1:30000    a server: SGLang's, vLLM's or OpenAI's API, found out by asking
  hf:PATH                   a checkpoint in transformers, in this process
  file:RUN.json             a run that was saved earlier, here or elsewhere
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _TARGETS
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="two or more; see below")
    parser.add_argument(
        "--layouts", nargs="+", default=[], metavar="LAYOUT", help="more targets, behind TARGET"
    )
    parser.add_argument(
        "--inject",
        metavar="NAME",
        help="plant a known defect in each layout but the baseline: a mutant's name, or a historic "
        "id such as sglang-23731",
    )
    parser.add_argument(
        "--floor",
        nargs="+",
        default=[],
        metavar="TARGET",
        help="targets that are known to be good: how far they are from the baseline is noise, too",
    )
    parser.add_argument(
        "--bisect",
        action="store_true",
        help="name the first layer and block where a target parts from the baseline (layouts and "
        "hf: only)",
    )
    parser.add_argument(
        "--mutants",
        action="store_true",
        help="instead of comparing: plant every known defect, and print who sees it (minutes)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="with --mutants: these defects alone"
    )
    add_model_option(parser)
    _add_prompt_options(parser)
    _add_verdict_options(parser)
    _add_server_options(parser)
    add_runtime_options(parser)
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out",
        metavar="DIR",
        help="where the runs, report.json and report.html go (default: a new folder below "
        "~/.cache/isomoe/parity)",
    )
    out.add_argument("--json", action="store_true", help="print one JSON document")


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group(
        "prompts (default: the held-out questions of the checkpoint, if it has any, else texts "
        "that ship with isomoe; random tokens without a tokenizer)"
    )
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help='one a line, as text or as JSON with "prompt" or "question"',
    )
    source.add_argument(
        "--random-prompts",
        type=int,
        metavar="M",
        help="M prompts of random tokens; the seed is --random-seed. A trained model may turn on "
        "one bit there: use --dtype float32",
    )
    source.add_argument(
        "--num-prompts",
        type=int,
        metavar="M",
        help=f"how many (default: {DEFAULT_COUNT}, or all of --prompts): see docs/parity.md",
    )
    source.add_argument(
        "--max-tokens", type=int, default=100, metavar="N", help="default: %(default)s"
    )
    source.add_argument(
        "--ignore-eos", action="store_true", help="decode on after the model's end tokens"
    )
    source.add_argument(
        "--top",
        type=int,
        default=8,
        metavar="K",
        help="likeliest candidates to record in each place (default: %(default)s)",
    )


def _add_verdict_options(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("verdict (default: against the measured noise floor)")
    limits.add_argument(
        "--thresholds", metavar="FILE", help='JSON with "false_alarm", "margin", "mean", "max"'
    )
    limits.add_argument(
        "--max-mean-delta", type=float, metavar="X", help="pin the mean |delta logprob|, in nats"
    )
    limits.add_argument(
        "--max-delta", type=float, metavar="X", help="pin any one |delta logprob|, in nats"
    )


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    from isomoe.parity.targets.detect import NAMES

    servers = parser.add_argument_group("servers")
    servers.add_argument("--dialect", choices=NAMES, help="default: found out by asking")
    servers.add_argument(
        "--served-model-name", metavar="NAME", help="default: the first that a server lists"
    )
    servers.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="the environment variable that holds the key; it is sent, and kept nowhere",
    )
    servers.add_argument(
        "--timeout-seconds", type=float, default=120.0, metavar="S", help="default: %(default)s"
    )
    servers.add_argument(
        "--max-concurrency",
        type=int,
        default=32,
        metavar="N",
        help="requests open at once (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens {args.max_tokens}: must be at least 1")
    if args.mutants:
        from isomoe.cli.parity_mutants import run_mutants

        return run_mutants(args)
    if args.only:
        raise ConfigError("--only: is for --mutants")
    comparison = _Comparison.of(args)
    report = comparison.measure()
    _write(comparison, report)
    return report.exit_code


@dataclass(frozen=True)
class _Comparison:
    """One call of the command.

    Attributes:
        names: of the targets, defects included, the baseline first.
        folder: where everything is saved.
    """

    args: argparse.Namespace
    names: tuple[str, ...]
    settings: "TargetSettings"
    folder: Path

    @classmethod
    def of(cls, args: argparse.Namespace) -> "_Comparison":
        """Reads the flags; nothing runs yet."""
        from isomoe.parity.targets.http_client import HttpSettings
        from isomoe.parity.targets.parse import TargetSettings

        engine = engine_config_from(args, Parallelism())
        infos: list[ModelInfo] = []

        def info() -> "ModelInfo":
            if not infos:
                from isomoe.engine.model_info import ModelInfo

                infos.append(ModelInfo.of(engine))
            return infos[0]

        http = HttpSettings(
            dialect=args.dialect,
            model=args.served_model_name,
            api_key=_api_key(args.api_key_env),
            timeout_seconds=args.timeout_seconds,
            max_concurrency=args.max_concurrency,
        )
        return cls(
            args=args,
            names=_names(args),
            settings=TargetSettings(engine=engine, info=info, stage=progress_bar, http=http),
            folder=Path(args.out) if args.out else _new_folder(),
        )

    def measure(self) -> "Report":
        """Runs every target."""
        from isomoe.parity.compare import compare
        from isomoe.parity.measure import Workload, record
        from isomoe.parity.noise import Noise
        from isomoe.parity.report import Report
        from isomoe.parity.targets.parse import target_of
        from isomoe.parity.verdict import Row, judge
        from isomoe.parity.words import in_words, tells_only_texts

        limits = self._thresholds()
        targets = [target_of(name, self.settings) for name in self.names]
        known_good = [target_of(name, self.settings) for name in self.args.floor]
        prompts = self._prompts(targets[0])
        work = Workload(
            prompts=prompts.prompts,
            max_tokens=self.args.max_tokens,
            ignore_eos=self.args.ignore_eos,
            top=self.args.top,
        )
        self.folder.mkdir(parents=True, exist_ok=True)

        def recorded(target: "Target | SavedRun", reference: "Run | None") -> "Run":
            found = record(target, work, reference=reference, stage=progress_bar)
            found.save(self._file(found.name))
            return found

        baseline = recorded(targets[0], None)
        good = [recorded(target, baseline) for target in known_good]
        for one in good:
            if one.error is not None:
                raise ConfigError(f"--floor {one.name}: {one.error}")
        noise = Noise.of(baseline, good)
        rows = []
        for target in targets[1:]:
            found = recorded(target, baseline)
            if tells_only_texts(found) or tells_only_texts(baseline):
                sides = [in_words(one, self._decode) for one in (baseline, found)]
            else:
                sides = [baseline, found]
            compared = compare(*sides)
            rows.append(Row(comparison=compared, judgement=judge(compared, noise, limits)))
        return Report(
            baseline=baseline,
            source=prompts.source,
            rows=tuple(rows),
            noise=noise,
            bisections=tuple(self._bisections(baseline, rows)),
            thresholds=limits,
            conditions=self._conditions(),
        )

    def _prompts(self, baseline: "Target | SavedRun") -> "Prompts":
        from isomoe.parity.prompts import Prompts, from_file, questions, random_ids, shipped
        from isomoe.parity.targets.saved import SavedRun

        args = self.args
        given = [args.prompts is not None, args.random_prompts is not None]
        if all(given):
            raise ConfigError("--prompts and --random-prompts: give one of them")
        if args.num_prompts is not None and args.num_prompts < 1:
            raise ConfigError(f"--num-prompts {args.num_prompts}: must be at least 1")
        count = args.num_prompts or DEFAULT_COUNT
        if isinstance(baseline, SavedRun) and not any(given):
            saved = baseline.run.prompts[: args.num_prompts]
            return Prompts(source=f"those of {baseline.name}", prompts=saved)
        if args.random_prompts is not None:
            return random_ids(args.random_prompts, self._vocab_size(), args.random_seed)
        if args.prompts is not None:
            found = from_file(args.prompts, args.num_prompts)
        elif self._is_local and (own := self._info.folder / "heldout.jsonl").is_file():
            assert self._tokenizer is not None
            return questions(own, self._tokenizer.encode, count)
        elif self._is_local and self._tokenizer is None:
            return random_ids(count, self._info.vocab_size, args.random_seed)
        else:
            found = shipped(count)
        return found if self._tokenizer is None else found.encoded(self._tokenizer.encode)

    @cached_property
    def _is_local(self) -> bool:
        """Whether the checkpoint is at hand: some target runs here, or the user named it."""
        from isomoe.parity.targets.parse import is_layout

        here = any(is_layout(name) for name in (*self.names, *self.args.floor))
        return here or self.args.model_path is not None

    @property
    def _info(self) -> "ModelInfo":
        return self.settings.info()

    @cached_property
    def _tokenizer(self) -> "Tokenizer | None":
        if not self._is_local:
            return None
        from isomoe.tokenizer import Tokenizer, has_tokenizer

        folder = self._info.folder
        return Tokenizer(folder) if has_tokenizer(folder) else None

    def _decode(self, ids: Sequence[int]) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(list(ids))

    def _vocab_size(self) -> int:
        if not self._is_local:
            raise ConfigError(
                "--random-prompts: the vocabulary is not known; --model-path PATH of the model "
                "that the servers run would tell it"
            )
        return self._info.vocab_size

    def _thresholds(self) -> "Thresholds":
        from isomoe.parity.thresholds import Thresholds

        args = self.args
        found = Thresholds() if args.thresholds is None else Thresholds.load(Path(args.thresholds))
        if args.max_mean_delta is not None:
            found = replace(found, mean=args.max_mean_delta)
        if args.max_delta is not None:
            found = replace(found, max=args.max_delta)
        return found

    def _bisections(self, baseline: "Run", rows: "Sequence[Row]") -> "list[Bisection]":
        """Of each target that was told apart, where both sides' hidden states can be seen."""
        if not self.args.bisect:
            return []
        from isomoe.parity.bisect import bisect, side_of
        from isomoe.parity.targets.parse import is_layout
        from isomoe.parity.verdict import Verdict

        def is_seen(name: str) -> bool:
            return is_layout(name) or name.startswith("hf:")

        apart = [row for row in rows if row.judgement.verdict is Verdict.DIFFERS]
        wanted = [row.comparison.other.name for row in apart]
        if not is_seen(self.names[0]) or not all(map(is_seen, wanted)):
            raise ConfigError("--bisect: sees into layouts and hf: checkpoints alone")
        texts = [
            (*(prompt.token_ids or ()), *(place.token.token_id or 0 for place in output))
            for prompt, output in zip(baseline.prompts, baseline.outputs, strict=True)
        ]
        sides = [
            side_of(name, self.settings.engine, self._info, progress_bar)
            for name in (self.names[0], *wanted)
        ]
        return [bisect(sides[0], side, texts) for side in sides[1:]]

    def _conditions(self) -> dict[str, object]:
        args = self.args
        affinity = getattr(os, "sched_getaffinity", None)
        return {
            "isomoe": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": len(affinity(0)) if affinity else os.cpu_count(),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "max_tokens": args.max_tokens,
            "ignore_eos": args.ignore_eos,
            "max_concurrency": args.max_concurrency,
            "max_running_requests": args.max_running_requests,
            "page_size": args.page_size,
            "random_seed": args.random_seed,
        }

    def _file(self, name: str) -> Path:
        """A new file for a target's run."""
        plain = "".join(letter if letter.isalnum() or letter in "+-." else "-" for letter in name)
        stem = plain.strip("-.")[:80] or "run"
        number = 1 + sum(file.name != "report.json" for file in self.folder.glob("*.json"))
        return self.folder / f"{number:02d}-{stem}.json"


def _write(comparison: _Comparison, report: "Report") -> None:
    from isomoe.parity.report import document, print_report, write_page

    found = document(report)
    folder = comparison.folder
    text = json.dumps(found, allow_nan=False)
    (folder / "report.json").write_text(text, encoding="utf-8")
    has_texts = comparison._tokenizer is not None
    write_page(
        report,
        folder / "report.html",
        decode=(lambda token: comparison._decode((token,))) if has_texts else None,
    )
    if comparison.args.json:
        print(text)
    else:
        print_report(report)
        print(f"saved: {folder}/report.html, report.json, and each run for file:RUN.json")


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    """Of all targets, defects included."""
    baseline, *others = [*args.targets, *args.layouts] or [""]
    if not baseline:
        raise ConfigError("parity: no target; `isomoe parity tp2 tp2,dp2,ep2` compares two layouts")
    if "+" in baseline and "://" not in baseline:
        raise ConfigError(f"{baseline}: the first target is the baseline, without a defect")
    if not others:
        raise ConfigError(
            f"{baseline}: one target has nothing to be compared with; `isomoe parity {baseline} "
            "tp2` would compare it with a layout of this engine"
        )
    if args.inject is None:
        return (baseline, *others)
    from isomoe.parity.targets.parse import is_layout

    for other in others:
        if not is_layout(other):
            raise ConfigError(f"--inject {args.inject}: {other} is no layout of this engine")
        if "+" in other:
            raise ConfigError(
                f"--inject {args.inject}: {other} has a defect already; one at a time"
            )
    return (baseline, *(f"{other}+{args.inject}" for other in others))


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"--api-key-env {variable}: the environment has no such variable")
    return key


def _new_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "isomoe" / "parity" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
