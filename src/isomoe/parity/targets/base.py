"""What can be compared: anything that decodes greedily and, if it can, scores given tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from isomoe.errors import IsomoeError
from isomoe.parity.run import Composition, Ids, Prompt, Text, token_ids

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""

Stage = Callable[[str], AbstractContextManager[Progress | None]]
"""Shows the progress of what it is given the name of."""


class TargetError(IsomoeError):
    """A target that cannot be reached, breaks off, or answers what cannot be right.

    The message begins with the target's name. Nothing is concluded from such a target.
    """


def given_ids(output: Text, name: str) -> Ids:
    """The ids of tokens that the target of this name is to score.

    Raises:
        TargetError: if the baseline tells none.
    """
    found = token_ids(output)
    if found is None:
        raise TargetError(
            f"{name}: scores token ids, and the baseline tells none; take a baseline that does"
        )
    return found


class Target(ABC):
    """One side of a comparison. It runs while it is entered, and may be entered once.

    Attributes:
        name: as the user typed it, without secrets.
        dialect: how it is spoken to. Known once it is entered.
        can_score: whether it scores given tokens. Known once it is entered.
        gives_logprobs: whether it tells log-probabilities at all. Known once it is entered.
        notes: what a reader of its row should know. Complete once it has answered.
    """

    name: str
    dialect: str
    can_score: bool = True
    gives_logprobs: bool = True
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __enter__(self) -> Self:
        """Starts it, or makes sure that it is there.

        Raises:
            TargetError: if it cannot be.
        """

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends it; nothing of it is left running."""

    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """Versions, model, dtype: what its numbers depend on, as JSON. No secrets."""

    def encode(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The same prompts, with the token ids that it reads their texts as, where it tells them.

        A baseline's are sent to every other target, so that all are asked the same.

        Raises:
            TargetError: as `generate`.
        """
        return list(prompts)

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        ignore_eos: bool,
        top: int,
        composition: Composition,
        progress: Progress | None = None,
    ) -> list[Text]:
        """Continues every prompt greedily.

        Args:
            top: how many of the likeliest candidates to record in each place; fewer where the
                target's limit is lower.

        Raises:
            TargetError: if it breaks off, or answers what cannot be right.
        """

    @abstractmethod
    def score(
        self,
        prompts: Sequence[Prompt],
        outputs: Sequence[Text],
        *,
        top: int,
        composition: Composition,
        progress: Progress | None = None,
    ) -> list[Text]:
        """What it says of every output token after its prompt, from one prefill of both.

        Raises:
            TargetError: as `generate`, and if it reads the tokens otherwise than they were given
                (another tokenizer).
        """
