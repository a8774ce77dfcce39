"""This package's own engine on one layout, with or without a planted defect."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from isomoe import __version__
from isomoe.config import EngineConfig
from isomoe.engine import LLM, SamplingParams
from isomoe.engine.laid_out import laid_out, planned
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.outputs import TokenLogprob
from isomoe.errors import ConfigError, IsomoeError
from isomoe.layout import Parallelism
from isomoe.parity.inject import instrument_of
from isomoe.parity.run import Candidate, Composition, Ids, Place, Prompt, Text
from isomoe.parity.targets.base import Progress, Stage, Target, TargetError, given_ids


class EngineTarget(Target):
    """The engine on a layout. Entering it starts the workers, leaving it ends them.

    Args:
        layout: the shorthand, and after a `+` a defect: `tp2,dp2,ep2+double-reduce`.
        config: every other setting.
        info: the checkpoint.
        stage: shows how the weights come in.

    Raises:
        ConfigError: if the layout cannot be, does not fit the model, or the defect cannot run.
    """

    dialect = "engine"

    def __init__(
        self,
        layout: str,
        config: EngineConfig,
        info: ModelInfo,
        stage: Stage,
    ) -> None:
        shorthand, _, self.defect = layout.partition("+")
        if layout.endswith("+"):
            raise ConfigError(f"layout {layout!r}: the name of a defect is missing after the '+'")
        parallelism = Parallelism.parse(shorthand)
        instrument = (
            instrument_of(self.defect, info.hf_config) if self.defect else config.instrument
        )
        # What can be refused is refused before any layout runs.
        config = replace(config, parallelism=parallelism, instrument=instrument)
        planned(config, info, laid_out(config, info).chain)
        self.name = f"{parallelism}+{self.defect}" if self.defect else str(parallelism)
        if self.defect and parallelism.tp_size == 1:
            self.notes = ("one rank: there is nothing to sum or move",)
        self._config = config
        self._info = info
        self._stage = stage
        self._llm: LLM | None = None

    def __enter__(self) -> Self:
        with self._stage(f"{self.name}: loading") as progress:
            try:
                self._llm = LLM.from_config(self._config, progress)
            except IsomoeError as error:
                raise TargetError(f"{self.name}: {error}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None

    def facts(self) -> Mapping[str, Any]:
        import torch

        return {
            "isomoe": __version__,
            "torch": torch.__version__,
            "layout": str(self._config.parallelism),
            "defect": self.defect or None,
            "model": self._config.model_path or self._info.folder.name,
            "device": self._info.device,
            "dtype": self._info.dtype,
        }

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
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=ignore_eos,
            logprobs=top,
            detokenize=False,
        )
        found = self._run(list(map(self._ids, prompts)), params, composition, progress)
        return [tuple(map(_place, output.logprobs or ())) for output in found]

    def score(
        self,
        prompts: Sequence[Prompt],
        outputs: Sequence[Text],
        *,
        top: int,
        composition: Composition,
        progress: Progress | None = None,
    ) -> list[Text]:
        params = SamplingParams(max_tokens=0, prompt_logprobs=top, detokenize=False)
        texts = [
            (*self._ids(prompt), *given_ids(output, self.name))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        found = self._run(texts, params, composition, progress)
        return [
            tuple(
                _place(token)
                for token in (answer.prompt_logprobs or ())[-len(output) :]
                if token is not None
            )
            for output, answer in zip(outputs, found, strict=True)
        ]

    def _run(
        self,
        texts: Sequence[Ids],
        params: SamplingParams,
        composition: Composition,
        progress: Progress | None,
    ) -> list[Any]:
        """The answers, in the order of the texts."""
        assert self._llm is not None
        order = list(range(len(texts)))
        if composition.backwards:
            order.reverse()
        size = composition.batch or len(texts)
        answers: dict[int, Any] = {}
        try:
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                whole = progress if size == len(texts) else None
                found = self._llm.generate([texts[index] for index in batch], params, whole)
                answers.update(zip(batch, found, strict=True))
                if progress is not None and whole is None:
                    progress(len(answers), len(texts))
        except IsomoeError as error:
            raise TargetError(f"{self.name}: {error}") from None
        return [answers[index] for index in range(len(texts))]

    def _ids(self, prompt: Prompt) -> Ids:
        if prompt.token_ids is None:
            raise TargetError(
                f"{self.name}: takes token ids, and there is no tokenizer for the prompts"
            )
        return prompt.token_ids


def _place(token: TokenLogprob) -> Place:
    top = tuple(Candidate(token_id, None, logprob) for token_id, logprob in token.top)
    ranked = (rank for rank, one in enumerate(top, 1) if one.token_id == token.token_id)
    return Place(Candidate(token.token_id, None, token.logprob), top, next(ranked, None))
