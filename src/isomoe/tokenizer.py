"""A checkpoint's tokenizer, read by transformers when first used."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from isomoe.errors import CheckpointError, RequestError

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


class Tokenizer:
    """Text to token ids and back.

    Construction reads nothing. The first use imports transformers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{self.folder}: the tokenizer cannot be read ({reason})"
            ) from None

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-text token."""
        found: int | None = self.hf.eos_token_id
        return found

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, with the special tokens that the tokenizer itself adds."""
        return tuple(self.hf.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self.hf.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str:
        """One token as text, special or not."""
        text: str = self.hf.decode([token_id])
        return text

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages ({"role", "content"}) as the text that asks for the assistant's answer.

        Raises:
            RequestError: if the tokenizer has no chat template.
        """
        if self.hf.chat_template is None:
            raise RequestError(f"{self.folder}: the tokenizer has no chat template")
        text: str = self.hf.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return text
