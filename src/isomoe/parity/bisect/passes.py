"""Under which conditions the prompts are run."""

from collections.abc import Sequence
from enum import StrEnum

from isomoe.parity.run import Ids

_SINGLE_TOKENS = 12


class Pass(StrEnum):
    """One way to run the prompts. A defect may hide from most of them."""

    TOGETHER = "together"
    """All in one step."""
    ALONE = "alone"
    """One prompt a step, so that the other attention groups have no rows."""
    EQUAL = "equal"
    """All in one step, each cut to the length of the shortest."""
    SMALL = "small"
    """Steps of one row: some of the prompts' tokens, each by itself."""
    JITTERED = "jittered"
    """All in one step, and what each block writes is rounded once more, at random."""

    @property
    def one_by_one(self) -> bool:
        """Whether each prompt has a step of its own."""
        return self in (Pass.ALONE, Pass.SMALL)

    def texts(self, prompts: Sequence[Ids]) -> list[Ids]:
        """What is run of the prompts."""
        if self is Pass.SMALL:
            # No token twice: near ties are routed alike then, and would count as several.
            tokens = list(dict.fromkeys(token for prompt in prompts for token in prompt))
            step = max(1, len(tokens) // _SINGLE_TOKENS)
            return [(token,) for token in tokens[::step][:_SINGLE_TOKENS]]
        most = min(map(len, prompts)) if self is Pass.EQUAL else None
        return [tuple(prompt[:most]) for prompt in prompts]
