"""A run that was saved, in the place of a target: it is not driven, it has answered already."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from isomoe.parity.run import Prompt, Run, Text
from isomoe.parity.targets.base import TargetError


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """A run from a file.

    Attributes:
        name: as typed.
        run: what was saved, as it was saved.
    """

    name: str
    run: Run

    @classmethod
    def load(cls, name: str, path: Path) -> Self:
        """Reads it.

        Raises:
            ConfigError: if the file holds none.
        """
        return cls(name=name, run=Run.load(path))

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        ignore_eos: bool,
        reference: Run | None,
    ) -> Run:
        """What it says of these prompts, in their order.

        Args:
            max_tokens: of longer outputs, the first so many.
            reference: the baseline; None if this is the baseline. Scores count only if they are of
                the baseline's tokens; there are none otherwise. (A run that was no baseline when it
                was saved scored another's tokens.)

        Raises:
            TargetError: if it is of other prompts, was asked otherwise, or was not completed.
        """
        saved = self.run
        if saved.error is not None:
            raise TargetError(f"{self.name}: the saved run was not completed ({saved.error})")
        if saved.ignore_eos not in (None, ignore_eos):
            how = "with" if saved.ignore_eos else "without"
            raise TargetError(f"{self.name}: was decoded {how} --ignore-eos; ask all targets so")
        most = max_tokens if saved.max_tokens is None else saved.max_tokens
        if reference is not None and most < max_tokens:
            raise TargetError(
                f"{self.name}: was saved with --max-tokens {most}; --max-tokens {most} for all "
                "targets would work"
            )
        places = [self._place_of(index, prompt) for index, prompt in enumerate(prompts)]
        lengths = [max_tokens] * len(places)
        found = replace(
            saved,
            name=self.name,
            prompts=tuple(saved.prompts[place] for place in places),
            outputs=self._cut(saved.outputs, places, lengths),
            scores=None,
            again={},
            max_tokens=saved.max_tokens and min(most, max_tokens),
            alone=self._alone(places),
        ).with_note(f"answers of {saved.name}, saved earlier")
        if saved.scores is None:
            return found
        given = found.outputs if reference is None else reference.outputs
        lengths = list(map(len, given))
        scores = self._cut(saved.scores, places, lengths)
        if not _same_tokens(scores, given):
            return found.with_note(
                "its scores are of other tokens than this baseline's: only what it decoded is "
                "compared"
            )
        again = {name: self._cut(texts, places, lengths) for name, texts in saved.again.items()}
        return replace(found, scores=scores, again=again)

    def _alone(self, places: Sequence[int]) -> int | None:
        """How many of the last of these were sent one at a time; None if others were, too."""
        if self.run.alone is None:
            return None
        first = len(self.run.prompts) - self.run.alone
        found = [place >= first for place in places]
        return sum(found) if found == sorted(found) else None

    def _place_of(self, index: int, prompt: Prompt) -> int:
        for place, known in enumerate(self.run.prompts):
            if _is_same(prompt, known):
                return place
        raise TargetError(
            f"{self.name}: prompt {index} is none of the {len(self.run.prompts)} that were saved; "
            "compare it on the same prompts, or save it again"
        )

    def _cut(
        self, texts: Sequence[Text], places: Sequence[int], lengths: Sequence[int]
    ) -> tuple[Text, ...]:
        if len(texts) != len(self.run.prompts):
            raise TargetError(
                f"{self.name}: holds {len(texts)} answers to {len(self.run.prompts)} prompts"
            )
        return tuple(texts[place][:length] for place, length in zip(places, lengths, strict=True))


def _is_same(one: Prompt, other: Prompt) -> bool:
    """By ids where both have them, else by text."""
    if one.token_ids is not None and other.token_ids is not None:
        return one.token_ids == other.token_ids
    return one.text is not None and one.text == other.text


def _same_tokens(ones: Sequence[Text], others: Sequence[Text]) -> bool:
    return all(
        len(one) == len(other)
        and all(a.token.is_token_of(b.token) for a, b in zip(one, other, strict=True))
        for one, other in zip(ones, others, strict=True)
    )
