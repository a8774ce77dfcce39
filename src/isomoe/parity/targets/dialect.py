"""What a dialect is: how a server is asked, and how its replies are read. No input or output."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from isomoe.errors import ConfigError
from isomoe.parity.run import Ids, Prompt, Text, token_ids


class Request(NamedTuple):
    """A document to be posted."""

    path: str
    body: dict[str, Any]


class Asked(NamedTuple):
    """What is asked of a greedy continuation; see `Target.generate`."""

    max_tokens: int
    ignore_eos: bool
    top: int


class Encoder(ABC):
    """Makes token ids of a text, with the server's own tokenizer."""

    @abstractmethod
    def request(self, model: str | None, text: str) -> Request:
        """Asks for them."""

    @abstractmethod
    def read(self, reply: Any) -> Ids:
        """Raises BadReply if they are not there."""


class Scorer(ABC):
    """Scores given tokens in one prefill."""

    @abstractmethod
    def request(self, model: str | None, prompt: Prompt, output: Text, top: int) -> Request:
        """Asks for the log-probabilities of `output` after `prompt`.

        Raises:
            ConfigError: if prompt or output are not in a form that the server takes.
        """

    @abstractmethod
    def read(self, reply: Any, prompt: Prompt, output: Text, top: int) -> Text:
        """Raises BadReply if they cannot be right."""


class Dialect(ABC):
    """One way to speak to a server.

    Attributes:
        name: as `--dialect` has it.
        gives_logprobs: whether it tells log-probabilities.
        notes: what a reader should know of everything that comes this way.
    """

    name: ClassVar[str]
    gives_logprobs: ClassVar[bool] = True
    notes: ClassVar[tuple[str, ...]] = ()

    @property
    def goes_on(self) -> bool:
        """Whether `ignore_eos` is sent."""
        return True

    @property
    @abstractmethod
    def sample(self) -> Prompt:
        """A tiny prompt that every server of this dialect takes."""

    @abstractmethod
    def request(self, model: str | None, prompt: Prompt, asked: Asked) -> Request:
        """Asks for a greedy continuation.

        Raises:
            ConfigError: if the prompt is not in a form that the server takes.
        """

    @abstractmethod
    def read(self, reply: Any, prompt: Prompt, asked: Asked) -> Text:
        """The continuation. Raises BadReply if it cannot be right."""

    def scorers(self) -> tuple[Scorer, ...]:
        """Ways to score given tokens, the best first; none if there is none."""
        return ()

    def encoder(self) -> Encoder | None:
        """Makes token ids of a text; None where texts are sent."""
        return None

    def served(self, reply: Any) -> Any:
        """Names the model behind a reply: another one is another model; None tells nothing."""
        return reply.get("model")


SAMPLE_IDS = Prompt((11, 12, 13), "Hello")
"""Token ids below 256 are in every vocabulary. The text is for servers that score texts alone."""
SAMPLE_TEXT = Prompt(None, "Hello")


def text_of(prompt: Prompt) -> str:
    """The prompt's text.

    Raises:
        ConfigError: if it has none.
    """
    if prompt.text is None:
        raise ConfigError(
            "this server takes texts, and the prompts are token ids; --prompts FILE would work"
        )
    return prompt.text


def ids_or_text(prompt: Prompt) -> Ids | str:
    """Token ids where they are known, which leave the server nothing to interpret."""
    return text_of(prompt) if prompt.token_ids is None else prompt.token_ids


def ids_of(prompt: Prompt, output: Text) -> Ids:
    """Prompt and output as token ids.

    Raises:
        ConfigError: if either has none.
    """
    found = token_ids(output)
    if prompt.token_ids is None or found is None:
        raise ConfigError(
            "this server scores token ids, and the baseline tells none; take a baseline that does"
        )
    return (*prompt.token_ids, *found)
