"""Trains the checkpoint's tokenizer: byte-level BPE with one token per digit.

Normalization and pre-tokenization are Qwen's, so every loader that knows Qwen's tokenizer makes
the same tokens. Nothing is put before a prompt. Run as `python -m recipes.arith.tokenizer DIR`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice

from recipes.arith.problems import stream
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 640
MAX_LENGTH = 1024
END_OF_TEXT, IM_START, IM_END, PAD = SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)
SYSTEM = (
    "You are a helpful assistant.",
    "You solve word problems step by step.",
    "Solve the problem and end with #### and the result.",
)
"""System messages seen in training. None is needed."""

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)


def plain_prompt(question: str) -> str:
    """The prompt for plain completion. The answer follows with a leading space."""
    return f"Question: {question}\nAnswer:"


def chat_prompt(question: str, system: str | None = None) -> str:
    """What the chat template makes of one user message with `add_generation_prompt`."""
    head = f"{IM_START}system\n{system}{IM_END}\n" if system else ""
    return f"{head}{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"


def build(num_problems: int) -> PreTrainedTokenizerFast:
    """Trains on the questions and answers of `num_problems` training problems."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(num_problems), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _texts(num_problems: int) -> Iterator[str]:
    yield "".join(f"{message}\n" for message in SYSTEM)
    for problem in islice(stream(0, "train"), num_problems):
        yield f"{plain_prompt(problem.question)} {problem.answer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("output", help="the folder to write the tokenizer's files to")
    parser.add_argument("--num-problems", type=int, default=20_000)
    args = parser.parse_args()
    tokenizer = build(args.num_problems)
    tokenizer.save_pretrained(args.output)
    print(f"{len(tokenizer)} tokens written to {args.output}")


if __name__ == "__main__":
    main()
