"""One comparison, from its targets to its report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isomoe.errors import ConfigError, IsomoeError
from isomoe.files import make_folder
from isomoe.parity.compare import compare
from isomoe.parity.measure import Workload, record
from isomoe.parity.noise import Noise
from isomoe.parity.prompts import (
    DEFAULT_COUNT,
    Prompts,
    from_file,
    questions,
    random_ids,
    shipped,
)
from isomoe.parity.report import Report
from isomoe.parity.run import Ids, Run
from isomoe.parity.targets.base import Target
from isomoe.parity.targets.detect import NAMES
from isomoe.parity.targets.parse import TargetSettings, is_layout, shown, target_of
from isomoe.parity.targets.reading import short
from isomoe.parity.targets.saved import SavedRun
from isomoe.parity.thresholds import Thresholds
from isomoe.parity.verdict import Row, Verdict, judge
from isomoe.parity.words import in_words
from isomoe.tokenizer import Tokenizer, has_tokenizer

if TYPE_CHECKING:
    from isomoe.parity.bisect import Bisection


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChoice:
    """Which prompts are asked for; what is None is left open.

    Attributes:
        file: `--prompts`.
        random: `--random-prompts`, how many.
        count: `--num-prompts`.
        seed: of random ones.
    """

    file: str | None = None
    random: int | None = None
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.file is not None and self.random is not None:
            raise ConfigError("--prompts and --random-prompts: give one of them")
        if self.count is not None and self.random is not None:
            raise ConfigError("--num-prompts and --random-prompts: give one of them")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"--num-prompts {self.count}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Session:
    """Targets, the baseline first, and what they are asked.

    Attributes:
        names: of all targets, defects included, as `target_of` takes them.
        known_good: targets whose distance from the baseline is noise.
        settings: what targets need beside their names.
        has_model: whether the checkpoint of `settings` is that of all targets, though none of them
            is a layout: the user named it.
        bisects: whether targets that differ are bisected.
        folder: where runs are saved; made before anything runs.
        conditions: what the report says of the circumstances.

    Raises:
        ConfigError: if the targets cannot be compared so.
    """

    names: tuple[str, ...]
    settings: TargetSettings
    folder: Path
    known_good: tuple[str, ...] = ()
    prompts: PromptChoice = field(default_factory=PromptChoice)
    max_tokens: int = 100
    ignore_eos: bool = False
    top: int = 8
    thresholds: Thresholds = field(default_factory=Thresholds)
    has_model: bool = False
    bisects: bool = False
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError(
                "parity: no target; `isomoe parity tp2 tp2,dp2,ep2` compares two layouts"
            )
        baseline, *others = self.names
        if is_layout(baseline) and "+" in baseline:
            raise ConfigError(f"{baseline}: the first target is the baseline, without a defect")
        if not others:
            raise ConfigError(
                f"{shown(baseline)}: one target has nothing to be compared with; `isomoe parity "
                f"{shown(baseline)} tp2` would compare it with a layout of this engine"
            )
        if self.max_tokens < 1:
            raise ConfigError(f"--max-tokens {self.max_tokens}: must be at least 1")
        if self.top < 0:
            raise ConfigError(f"--top {self.top}: must be at least 0")
        for name in self.names if self.bisects else ():
            if not (is_layout(name) or name.startswith("hf:")):
                raise ConfigError(
                    f"--bisect {shown(name)}: its hidden states cannot be seen; those of "
                    "layouts and of hf:PATH can"
                )

    def measure(self) -> Report:
        """Runs every target, one after the other, and saves each run.

        Raises:
            ConfigError: if a target, a prompt or the folder cannot be, before anything runs; or if
                a target fails that is said to be good.
            TargetError: if the baseline fails.
        """
        targets = [target_of(name, self.settings) for name in self.names]
        known_good = [target_of(name, self.settings) for name in self.known_good]
        chosen = self._chosen(targets[0])
        work = Workload(
            prompts=chosen.prompts,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            top=self.top,
        )
        make_folder(self.folder)
        baseline = self._recorded(targets[0], work, None)
        work = work.as_asked(baseline)
        good = [self._recorded(target, work, baseline) for target in known_good]
        for one in good:
            if one.error is not None:
                raise ConfigError(f"--floor: {one.error}")
        noise = Noise.of(baseline, good)
        rows = [
            self._row(baseline, self._recorded(target, work, baseline), noise)
            for target in targets[1:]
        ]
        rows, bisections = self._bisected(baseline, rows) if self.bisects else (rows, [])
        return Report(
            baseline=baseline,
            source=chosen.source,
            rows=tuple(rows),
            noise=noise,
            bisections=tuple(bisections),
            thresholds=self.thresholds,
            conditions={**self.conditions, "max_tokens": work.max_tokens},
        )

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """That of the checkpoint at hand; None if there is none."""
        if not self._is_local:
            return None
        folder = self.settings.info().folder
        return Tokenizer(folder) if has_tokenizer(folder) else None

    def decode(self, ids: Ids) -> str:
        """The text of token ids; there must be a tokenizer."""
        assert self.tokenizer is not None
        return self.tokenizer.decode(list(ids))

    @property
    def _is_local(self) -> bool:
        return self.has_model or any(map(is_layout, (*self.names, *self.known_good)))

    def _chosen(self, baseline: Target | SavedRun) -> Prompts:
        """The prompts, with token ids where there is a tokenizer."""
        choice = self.prompts
        count = choice.count or DEFAULT_COUNT
        if choice.random is not None:
            return random_ids(choice.random, self._vocab_size(), choice.seed)
        if choice.file is not None:
            found = from_file(choice.file, choice.count)
        elif isinstance(baseline, SavedRun):
            saved = baseline.run.prompts[: choice.count]
            return Prompts(source=f"those of {baseline.name}", prompts=saved)
        elif not self._is_local:
            return shipped(count)
        elif self.tokenizer is None:
            return random_ids(count, self._vocab_size(), choice.seed)
        elif (own := self.settings.info().folder / "heldout.jsonl").is_file():
            return questions(own, self.tokenizer.encode, count)
        else:
            found = shipped(count)
        return found if self.tokenizer is None else found.encoded(self.tokenizer.encode)

    def _vocab_size(self) -> int:
        if not self._is_local:
            raise ConfigError(
                "--random-prompts: the vocabulary is not known; --model-path PATH of the model "
                "that the servers run would tell it"
            )
        return self.settings.info().vocab_size

    def _recorded(self, target: Target | SavedRun, work: Workload, baseline: Run | None) -> Run:
        found = record(target, work, reference=baseline, stage=self.settings.stage)
        found.save(self._file(found.name))
        return found

    def _file(self, name: str) -> Path:
        """A new file for a target's run."""
        plain = "".join(letter if letter.isalnum() or letter in "+-." else "-" for letter in name)
        stem = plain.strip("-.")[:80] or "run"
        number = 1 + sum(file.name != "report.json" for file in self.folder.glob("*.json"))
        return self.folder / f"{number:02d}-{stem}.json"

    def _row(self, baseline: Run, found: Run, noise: Noise) -> Row:
        found = _with_other_model(baseline, found)
        if not (found.gives_logprobs and baseline.gives_logprobs):
            decode = None if self.tokenizer is None else self.decode
            baseline, found = in_words(baseline, decode), in_words(found, decode)
        compared = compare(baseline, found)
        return Row(comparison=compared, judgement=judge(compared, noise, self.thresholds))

    def _bisected(self, baseline: Run, rows: Sequence[Row]) -> "tuple[list[Row], list[Bisection]]":
        """Bisects each target that was told apart. One that fails is noted in its row."""
        from isomoe.parity.bisect import bisect, side_of  # brings torch

        texts = [
            (*(prompt.token_ids or ()), *(place.token.token_id or 0 for place in output))
            for prompt, output in zip(baseline.prompts, baseline.outputs, strict=True)
        ]
        engine, info, stage = self.settings.engine, self.settings.info(), self.settings.stage
        base = side_of(self.names[0], engine, info, stage)
        noted: list[Row] = []
        found: list[Bisection] = []
        for name, row in zip(self.names[1:], rows, strict=True):
            if row.judgement.verdict is Verdict.DIFFERS:
                try:
                    found.append(bisect(base, side_of(name, engine, info, stage), texts))
                except IsomoeError as error:
                    other = row.comparison.other.with_note(f"not bisected: {error}")
                    row = replace(row, comparison=replace(row.comparison, other=other))
            noted.append(row)
        return noted, found


def _with_other_model(baseline: Run, found: Run) -> Run:
    """The run, with a note if two servers name two models; a path and a name tell nothing."""
    ours, theirs = baseline.facts.get("model"), found.facts.get("model")
    are_servers = {baseline.dialect, found.dialect} <= set(NAMES)
    if not are_servers or None in (ours, theirs) or ours == theirs:
        return found
    return found.with_note(f"names its model {short(theirs)}, and the baseline {short(ours)}")
