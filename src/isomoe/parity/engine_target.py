"""This package's own engine on one layout, with or without a planted defect."""

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from isomoe.config import EngineConfig
from isomoe.engine import LLM, SamplingParams
from isomoe.engine.model_info import ModelInfo
from isomoe.errors import ConfigError
from isomoe.layout import MACHINES, Parallelism, make_plan
from isomoe.models import build
from isomoe.parity.compare import Ids, Output
from isomoe.parity.inject import instrument_of
from isomoe.parity.target import Progress, Stage, Target

CANDIDATES = 8
"""Likeliest tokens recorded in each place: enough to know both sides of a near tie."""


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
        instrument = instrument_of(self.defect, info.hf_config) if self.defect else None
        # What can be refused is refused before any layout runs.
        make_plan(build(info.hf_config, parallelism).chain, MACHINES[info.device])
        self.name = f"{parallelism}+{self.defect}" if self.defect else str(parallelism)
        if self.defect and parallelism.tp_size == 1:
            self.notes = ("one rank: there is nothing to sum or move",)
        self._config = replace(config, parallelism=parallelism, instrument=instrument)
        self._stage = stage
        self._llm: LLM | None = None

    def __enter__(self) -> Self:
        with self._stage(f"{self.name}: loading") as progress:
            self._llm = LLM.from_config(self._config, progress)
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

    def generate(
        self,
        prompts: Sequence[Ids],
        *,
        max_tokens: int,
        ignore_eos: bool,
        progress: Progress | None = None,
    ) -> list[Output]:
        """Continues every prompt greedily."""
        assert self._llm is not None
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=ignore_eos,
            logprobs=CANDIDATES,
            detokenize=False,
        )
        outputs = []
        for output in self._llm.generate(prompts, params, progress):
            assert output.logprobs is not None
            outputs.append(
                Output(
                    token_ids=output.token_ids,
                    logprobs=tuple([token.logprob for token in output.logprobs]),
                    tops=tuple([token.top for token in output.logprobs]),
                )
            )
        return outputs

    def score(
        self, prompts: Sequence[Ids], outputs: Sequence[Ids], progress: Progress | None = None
    ) -> list[tuple[float, ...]]:
        """The log-probability of every output token after its prompt, from one prefill of both."""
        assert self._llm is not None
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, detokenize=False)
        texts = [(*prompt, *output) for prompt, output in zip(prompts, outputs, strict=True)]
        scores = []
        for given, answer in zip(outputs, self._llm.generate(texts, params, progress), strict=True):
            assert answer.prompt_logprobs is not None
            tail = answer.prompt_logprobs[-len(given) :]
            scores.append(tuple([token.logprob for token in tail if token is not None]))
        return scores
