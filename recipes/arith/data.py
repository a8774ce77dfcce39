"""Training documents as padded token batches, made by worker processes from a seed.

A document is one problem as a plain completion, one as a chat, or several of them in a row (a
few-shot prompt, a chat of several turns). Only answers and the token that ends them are trained.
In a few-shot prompt nothing is trained to follow an answer but the last one, so after an answer
the model always ends.

Batches have one of three fixed lengths, so that a compiled training step has three shapes. Their
order depends on the seed alone, not on the number of workers or their speed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context

import numpy as np
from recipes.arith.problems import Problem, stream
from recipes.arith.stories import Draw
from recipes.arith.tokenizer import (
    END_OF_TEXT,
    IM_END,
    PAD,
    SYSTEM,
    chat_prompt,
    plain_prompt,
)
from tokenizers import Tokenizer

SHORT, LONG, SEVERAL = LENGTHS = (160, 208, 720)
SHARD_PROBLEMS = 16_384
SEVERAL_SHARE = 0.05
SYSTEM_SHARE = 0.3

Piece = tuple[str, bool]
"""Text, and whether the model is trained to write it."""


@dataclass(slots=True)
class Bucket:
    """Documents of one length. ids: uint16 [rows, length]; trained: bool [rows, length]."""

    ids: list[np.ndarray] = field(default_factory=list)
    trained: list[np.ndarray] = field(default_factory=list)


def plain_document(problems: list[Problem]) -> list[Piece]:
    """One problem, or a few-shot prompt whose last problem is the one that is asked."""
    pieces: list[Piece] = []
    for i, problem in enumerate(problems):
        gap = "\n\n" if i else ""
        pieces += [(gap + plain_prompt(problem.question), False), (f" {problem.answer}", True)]
    return [*pieces, (END_OF_TEXT, True)]


def chat_document(problems: list[Problem], system: str | None) -> list[Piece]:
    """One turn or several, as the chat template writes them."""
    pieces: list[Piece] = []
    for i, problem in enumerate(problems):
        gap = "\n" if i else ""
        prompt = chat_prompt(problem.question, None if i else system)
        pieces += [(gap + prompt, False), (problem.answer, True), (IM_END, True)]
    return pieces


def documents(problems: Iterator[Problem], draw: Draw) -> Iterator[list[Piece]]:
    """Documents of the mixture until the problems run out."""
    while taken := list(islice(problems, draw.n(2, 5) if draw.share() < SEVERAL_SHARE else 1)):
        if draw.share() < 0.5:
            yield plain_document(taken)
        else:
            system = draw.pick(*SYSTEM) if draw.share() < SYSTEM_SHARE else None
            yield chat_document(taken, system)


def shard(
    tokenizer_file: str, seed: int, index: int, split: str = "train", size: int = SHARD_PROBLEMS
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The documents of one shard as `(ids, trained)` by length. Too long ones are left out."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    tokenizer = Tokenizer.from_file(tokenizer_file)
    pad = tokenizer.token_to_id(PAD)
    draw = Draw(f"documents:{seed}:{index}")
    problems = islice(stream(seed * 1_000_000 + index, split), size)
    found = list(documents(problems, draw))
    texts = [text for pieces in found for text, _ in pieces]
    encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    rows: dict[int, list[tuple[list[int], list[bool]]]] = {length: [] for length in LENGTHS}
    for pieces in found:
        ids: list[int] = []
        trained: list[bool] = []
        for _, train in pieces:
            piece = next(encoded).ids
            ids += piece
            trained += [train] * len(piece)
        length = next((x for x in LENGTHS if len(ids) <= x), None)
        if length is not None:
            rows[length].append((ids, trained))
    return {length: _matrix(length, pad, found) for length, found in rows.items()}


def _matrix(
    length: int, pad: int, rows: list[tuple[list[int], list[bool]]]
) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(rows), length), pad, dtype=np.uint16)
    trained = np.zeros((len(rows), length), dtype=bool)
    for row, (tokens, flags) in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        trained[row, : len(flags)] = flags
    return ids, trained


def batches(
    tokenizer_file: str, seed: int, batch_tokens: int, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches of about `batch_tokens` positions. Each document is seen once.

    The worker processes are forked when the first batch is asked for: ask before using CUDA.
    """
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        ahead: deque[Future[dict[int, tuple[np.ndarray, np.ndarray]]]] = deque()
        waiting = {length: Bucket() for length in LENGTHS}
        index = 0
        try:
            while True:
                while len(ahead) < 3 * workers:
                    ahead.append(pool.submit(shard, tokenizer_file, seed, index))
                    index += 1
                yield from _drain(ahead.popleft().result(), waiting, batch_tokens)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _drain(
    made: dict[int, tuple[np.ndarray, np.ndarray]], waiting: dict[int, Bucket], batch_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The full batches that a shard completes, lengths interleaved."""
    queues: list[deque[tuple[np.ndarray, np.ndarray]]] = []
    for length, (ids, trained) in made.items():
        bucket = waiting[length]
        all_ids = np.concatenate([*bucket.ids, ids])
        all_trained = np.concatenate([*bucket.trained, trained])
        rows = batch_tokens // length
        full = len(all_ids) // rows * rows
        bucket.ids, bucket.trained = [all_ids[full:]], [all_trained[full:]]
        queues.append(
            deque((all_ids[i : i + rows], all_trained[i : i + rows]) for i in range(0, full, rows))
        )
    while any(queues):
        longest = max(queues, key=len)
        yield longest.popleft()
