"""A causal language model of transformers, in this process."""

import gc
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from isomoe.config import Device, DType
from isomoe.parity.run import Candidate, Composition, Ids, Place, Prompt, Text
from isomoe.parity.targets.base import Progress, Stage, Target, TargetError, given_ids
from isomoe.parity.transformers_model import load_model

if TYPE_CHECKING:
    from torch import Tensor

_MOST_TOGETHER = 16
"""Rows of a batch where the composition sets no limit: logits of more would fill memories."""


class TransformersTarget(Target):
    """A model that transformers computes. Entering it loads the weights, leaving it drops them.

    Args:
        name: as typed.
        path: a folder or a hub id.
        dtype: AUTO takes the checkpoint's.
        device: AUTO takes a GPU where there is one.
        stage: shows that the weights come in.
    """

    def __init__(self, name: str, path: str, *, dtype: DType, device: Device, stage: Stage) -> None:
        self.name = name
        self.dialect = "transformers"
        self._path = path
        self._dtype = dtype
        self._device = device
        self._stage = stage
        self._model: Any = None
        self._tokenizer: Any = None
        self._keeps = False
        self._spelling: dict[int, str] = {}

    def __enter__(self) -> Self:
        with self._stage(f"{self.name}: loading"):
            self._load()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import torch

        self._model = self._tokenizer = None
        gc.collect()  # modules hold one another
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the next target needs

    def facts(self) -> Mapping[str, Any]:
        import torch
        import transformers

        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "model": self._path,
            "device": str(self._model.device),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "attention": self._model.config._attn_implementation,
            "batches": f"padded on the left, at most {_MOST_TOGETHER} rows",
        }

    def encode(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return [
            prompt if prompt.token_ids is not None else prompt._replace(token_ids=self._ids(prompt))
            for prompt in prompts
        ]

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
        ends = frozenset[int]() if ignore_eos else self._end_ids()
        texts = [self._ids(prompt) for prompt in prompts]

        def decode(batch: list[int]) -> list[Text]:
            return self._decode([texts[index] for index in batch], max_tokens, ends, top)

        return self._in_batches(decode, len(texts), composition, progress)

    def score(
        self,
        prompts: Sequence[Prompt],
        outputs: Sequence[Text],
        *,
        top: int,
        composition: Composition,
        progress: Progress | None = None,
    ) -> list[Text]:
        given = [given_ids(output, self.name) for output in outputs]
        texts = [(*self._ids(prompt), *ids) for prompt, ids in zip(prompts, given, strict=True)]

        def score(batch: list[int]) -> list[Text]:
            return self._score(
                [texts[index] for index in batch], [given[index] for index in batch], top
            )

        return self._in_batches(score, len(texts), composition, progress)

    def _load(self) -> None:
        import torch

        device = str(self._device)
        if self._device is Device.AUTO:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_model(self.name, self._path, dtype=str(self._dtype), device=device)
        self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        try:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._path)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError):
            self.notes = ("no tokenizer: tokens are shown as ids",)

    def _ids(self, prompt: Prompt) -> Ids:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.text is None or self._tokenizer is None:
            raise TargetError(f"{self.name}: there is no tokenizer for the prompts")
        return tuple(self._tokenizer(prompt.text)["input_ids"])

    def _end_ids(self) -> frozenset[int]:
        found = self._model.generation_config.eos_token_id
        if found is None:
            found = getattr(self._model.config, "eos_token_id", None)
        return frozenset([found] if isinstance(found, int) else found or ())

    def _in_batches(
        self,
        work: Callable[[list[int]], list[Text]],
        count: int,
        composition: Composition,
        progress: Progress | None,
    ) -> list[Text]:
        """Every text's, in their order."""
        import torch

        order = list(range(count))
        if composition.backwards:
            order.reverse()
        size = min(composition.batch or _MOST_TOGETHER, _MOST_TOGETHER)
        found: dict[int, Text] = {}
        for start in range(0, count, size):
            batch = order[start : start + size]
            try:
                with torch.inference_mode():
                    found.update(zip(batch, work(batch), strict=True))
            except (RuntimeError, IndexError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise TargetError(f"{self.name}: transformers cannot run it ({reason})") from None
            if progress is not None:
                progress(len(found), count)
        return [found[index] for index in range(count)]

    def _decode(
        self, texts: list[Ids], max_tokens: int, ends: frozenset[int], top: int
    ) -> list[Text]:
        """Greedy, with a KV cache; a row that has ended goes on unread."""
        import torch

        rows, mask = self._padded(texts)
        cache = None
        outputs: list[list[Place]] = [[] for _ in texts]
        for _ in range(max_tokens):
            logits, cache = self._forward(rows, mask, cache, keep=1)
            logprobs = torch.log_softmax(logits[:, -1].float(), dim=-1)
            chosen = logprobs.argmax(dim=-1)
            for output, place in zip(outputs, self._places(logprobs, chosen, top), strict=True):
                if not output or output[-1].token.token_id not in ends:
                    output.append(place)
            if all(output[-1].token.token_id in ends for output in outputs):
                break
            rows = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(texts), 1)], dim=1)
        return [tuple(output) for output in outputs]

    def _score(self, texts: list[Ids], given: list[Ids], top: int) -> list[Text]:
        """One forward pass; each row's last tokens are the given ones."""
        import torch

        rows, mask = self._padded(texts)
        logits, _ = self._forward(rows, mask, None, keep=max(map(len, given)) + 1)
        scores = []
        for row, ids in enumerate(given):
            logprobs = torch.log_softmax(logits[row, -len(ids) - 1 : -1].float(), dim=-1)
            tokens = torch.tensor(ids, device=logprobs.device)
            scores.append(tuple(self._places(logprobs, tokens, top)))
        return scores

    def _padded(self, texts: list[Ids]) -> "tuple[Tensor, Tensor]":
        """Token ids and attention mask, padded on the left so that all rows end together."""
        import torch

        longest = max(map(len, texts))
        rows = [[*([0] * (longest - len(ids))), *ids] for ids in texts]
        mask = [[*([0] * (longest - len(ids))), *([1] * len(ids))] for ids in texts]
        device = self._model.device
        return torch.tensor(rows, device=device), torch.tensor(mask, device=device)

    def _forward(
        self, rows: "Tensor", mask: "Tensor", cache: Any, keep: int
    ) -> "tuple[Tensor, Any]":
        """Logits of the last `keep` places, or of all where the model cannot leave out others."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -rows.shape[1] :]
        found = self._model(
            input_ids=rows,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": keep} if self._keeps else {}),
        )
        return found.logits, found.past_key_values

    def _places(self, logprobs: "Tensor", tokens: "Tensor", top: int) -> list[Place]:
        """One for each row of `logprobs`, [rows, vocabulary]."""
        own = logprobs.gather(-1, tokens[:, None])
        ranks = (logprobs > own).sum(dim=-1) + 1
        likeliest = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        rows = zip(
            tokens.tolist(),
            own[:, 0].tolist(),
            ranks.tolist(),
            likeliest.indices.tolist(),
            likeliest.values.tolist(),
            strict=True,
        )
        return [
            Place(
                self._candidate(token_id, logprob),
                tuple(map(self._candidate, ids, values)),
                rank,
            )
            for token_id, logprob, rank, ids, values in rows
        ]

    def _candidate(self, token_id: int, logprob: float) -> Candidate:
        if math.isnan(logprob):
            raise TargetError(f"{self.name}: a log-probability is NaN")
        if self._tokenizer is None:
            return Candidate(token_id, None, logprob)
        if token_id not in self._spelling:
            self._spelling[token_id] = self._tokenizer.decode([token_id])
        return Candidate(token_id, self._spelling[token_id], logprob)
