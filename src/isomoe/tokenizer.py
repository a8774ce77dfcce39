"""A checkpoint's tokenizer, read by transformers when first used."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from isomoe.errors import CheckpointError, ConfigError, RequestError

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


class Tokenizer:
    """Text to token ids and back.

    Construction reads nothing. The first use imports transformers.

    Args:
        chat_template: a file with a Jinja template that replaces the tokenizer's own.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        self.folder = folder
        self._chat_template = chat_template

    @cached_property
    def hf(self) -> Any:
        """transformers' own object.

        Raises:
            RequestError: if the folder has no tokenizer.
            CheckpointError: if it has one that cannot be read.
        """
        if not has_tokenizer(self.folder):
            raise RequestError(
                f"{self.folder} has no tokenizer, so text cannot be used; token ids would work"
            )
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{self.folder}: the tokenizer cannot be read ({reason})"
            ) from None
        if self._chat_template is not None:
            try:
                found.chat_template = Path(self._chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"--chat-template {self._chat_template}: not readable ({error})"
                ) from None
        return found

    @cached_property
    def exists(self) -> bool:
        """Whether the folder has one."""
        return has_tokenizer(self.folder)

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-text token."""
        found: int | None = self.hf.eos_token_id
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text, with the special tokens that the tokenizer itself adds."""
        return tuple(self.hf.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        text: str = self.hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    @cached_property
    def longest_token(self) -> int:
        """The most bytes that one token stands for."""
        return max(len(token.encode()) for token in self.hf.get_vocab())

    def stream(self) -> "TextStream":
        """Text as its tokens come, without special tokens.

        Raises:
            CheckpointError: if the tokenizer cannot do so.
        """
        if not self.hf.is_fast:
            raise CheckpointError(f"{self.folder}: text needs a tokenizer.json; there is none")
        return TextStream(self)

    def token(self, token_id: int) -> str:
        """One token as text, special or not."""
        text: str = self.hf.decode([token_id])
        return text

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> str:
        """Messages (OpenAI's form) as the text that asks for the assistant's answer.

        Args:
            tools: what the template may offer to the model; OpenAI's form.
            settings: of the template, beside its own.

        Raises:
            RequestError: if there is no template, or it refuses the messages.
        """
        if self.hf.chat_template is None:
            raise RequestError(
                f"{self.folder}: the tokenizer has no chat template; --chat-template FILE gives one"
            )
        settings = {"add_generation_prompt": True, **settings}
        try:
            text: str = self.hf.apply_chat_template(
                list(messages), tools=tools and list(tools), tokenize=False, **settings
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RequestError(f"the chat template refuses the messages: {reason}") from None
        return text


class TextStream:
    """Token ids in, text out as soon as its characters are whole.

    The pieces together are what `Tokenizer.decode` makes of all the ids.
    """

    __slots__ = ("_backend", "_ids", "_length", "_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._backend = tokenizer.hf.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0

    def add(self, token_id: int) -> str:
        """The text that one more token makes whole; often none."""
        self._ids.append(token_id)
        text = self._stream.step(self._backend, token_id) or ""
        self._length += len(text)
        return text

    def end(self) -> str:
        """What is left at the end: characters that will not become whole."""
        return self._tokenizer.decode(self._ids)[self._length :]
