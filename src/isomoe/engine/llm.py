"""`LLM`: the engine for programs that have all their prompts at hand."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Self

from isomoe.config import Device, DType, EngineConfig, LoadFormat, choice
from isomoe.engine.core import EngineCore, Update
from isomoe.engine.executor import Progress
from isomoe.engine.outputs import FinishReason, RequestOutput, TokenLogprob
from isomoe.engine.sampling_params import SamplingParams
from isomoe.engine.step import Request
from isomoe.errors import RequestError
from isomoe.layout import Parallelism
from isomoe.tokenizer import Tokenizer, has_tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""


class LLM:
    """A model, ready to generate. Use it as a context manager, or call `shutdown`.

    The arguments are the fields of `EngineConfig`, with those of `Parallelism` beside them.

    Args:
        load_progress: called with (tensors done, tensors in all) while weights are read.

    Raises:
        ConfigError: if the settings fit neither one another nor the model.
        CheckpointError: if the checkpoint cannot be read.
    """

    def __init__(
        self,
        model_path: str | None = None,
        *,
        tp_size: int = 1,
        attn_dp_size: int = 1,
        ep_size: int = 1,
        moe_dense_tp_size: int | None = None,
        enable_dp_lm_head: bool = False,
        load_format: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        context_length: int | None = None,
        max_running_requests: int = 256,
        max_total_tokens: int | None = None,
        page_size: int = 16,
        chunked_prefill_size: int = 2048,
        random_seed: int = 0,
        instrument: str | None = None,
        load_progress: Progress | None = None,
    ) -> None:
        config = EngineConfig(
            model_path=None if model_path is None else str(model_path),
            parallelism=Parallelism(
                tp_size=tp_size,
                attn_dp_size=attn_dp_size,
                ep_size=ep_size,
                moe_dense_tp_size=moe_dense_tp_size,
                enable_dp_lm_head=enable_dp_lm_head,
            ),
            load_format=choice(LoadFormat, load_format, "--load-format"),
            dtype=choice(DType, dtype, "--dtype"),
            device=choice(Device, device, "--device"),
            context_length=context_length,
            max_running_requests=max_running_requests,
            max_total_tokens=max_total_tokens,
            page_size=page_size,
            chunked_prefill_size=chunked_prefill_size,
            random_seed=random_seed,
            instrument=instrument,
        )
        self._start(config, load_progress)

    @classmethod
    def from_config(cls, config: EngineConfig, load_progress: Progress | None = None) -> Self:
        """The same from a configuration that is at hand."""
        llm = cls.__new__(cls)
        llm._start(config, load_progress)
        return llm

    def _start(self, config: EngineConfig, load_progress: Progress | None) -> None:
        self.config = config
        self.core = EngineCore(config, load_progress)
        self.info = self.core.info
        self.tokenizer = Tokenizer(self.info.folder)
        self._has_tokenizer = has_tokenizer(self.info.folder)
        self._seeds = Random(config.random_seed)
        self._next_id = 0
        self._end = weakref.finalize(self, self.core.shutdown)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """Generates for every prompt; the outputs are in the order of the prompts.

        Nothing runs unless every request can be served.

        Args:
            prompts: one or several, each as text or as token ids.
            sampling_params: one for all, or one for each prompt; None is `SamplingParams()`.
            progress: called with (requests finished, requests in all).

        Raises:
            RequestError: if a prompt is empty or too long, or its ids are not of the vocabulary.
            EngineDeadError: if a worker fails; the engine is gone then.
        """
        several = [prompts] if _is_one(prompts) else list(prompts)
        params = sampling_params or SamplingParams()
        each = [params] * len(several) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(several):
            raise RequestError(f"{len(several)} prompts and {len(each)} sampling_params")
        tasks = [
            self._task(prompt, one, f"prompt {index}: " if len(several) > 1 else "")  # type: ignore[arg-type]
            for index, (prompt, one) in enumerate(zip(several, each, strict=True))
        ]
        for task in tasks:
            self.core.add(task.request)
        try:
            self._run(tasks, progress)
        except BaseException:
            # A step may be under way, so that nothing can follow it.
            self.shutdown()
            raise
        return [self._output(task) for task in tasks]

    def shutdown(self) -> None:
        """Ends the workers and frees the memory. May be called twice."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _run(self, tasks: list["_Task"], progress: Callable[[int, int], None] | None) -> None:
        by_id = {task.request.request_id: task for task in tasks}
        open_tasks = len(tasks)
        while open_tasks:
            for update in self.core.step():
                task = by_id[update.request_id]
                task.take(update)
                if task.request.params.stop and task.finish_reason is not FinishReason.STOP:
                    self._stop_at_text(task)
                if task.finish_reason is not None:
                    open_tasks -= 1
                    if progress is not None:
                        progress(len(tasks) - open_tasks, len(tasks))

    def _stop_at_text(self, task: "_Task") -> None:
        text = self.tokenizer.decode(task.token_ids)
        found = [at for at in map(text.find, task.request.params.stop) if at >= 0]
        if found:
            task.text = text[: min(found)]
            task.finish_reason = FinishReason.STOP
            self.core.remove(task.request.request_id)

    def _task(self, prompt: Prompt, params: SamplingParams, name: str) -> "_Task":
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        if params.stop and not self._has_tokenizer:
            raise RequestError(f"{name}stop texts need a tokenizer; {self.info.folder} has none")
        if not ids:
            raise RequestError(f"{name}the prompt is empty")
        limit = self.info.context_length
        if len(ids) + min(params.max_tokens, 1) > limit:
            raise RequestError(
                f"{name}the prompt has {len(ids)} tokens, the context length is {limit} "
                "with at least one token of output; shorten the prompt"
            )
        self._check_ids("the prompt's token ids", ids, name)
        self._check_ids("stop_token_ids", params.stop_token_ids, name)
        max_tokens = min(params.max_tokens, limit - len(ids))
        try:
            self.core.scheduler.check_fits(len(ids), max_tokens)
        except RequestError as error:
            raise RequestError(f"{name}{error}", error.status) from None
        end = frozenset() if params.ignore_eos else self.info.eos_token_ids
        drawn = self._seeds.getrandbits(63)
        request = Request(
            request_id=self._next_id,
            prompt_token_ids=ids,
            params=params,
            max_tokens=max_tokens,
            stop_ids=end | frozenset(params.stop_token_ids),
            seed=drawn if params.seed is None else params.seed,
        )
        self._next_id += 1
        return _Task(prompt if isinstance(prompt, str) else None, request)

    def _check_ids(self, what: str, ids: Sequence[int], name: str) -> None:
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise RequestError(f"{name}{what} must be integers, not {token!r}")
        wrong = [
            token
            for token in (min(ids, default=0), max(ids, default=0))
            if not 0 <= token < self.info.vocab_size
        ]
        if wrong:
            raise RequestError(
                f"{name}{what} hold {wrong[0]}; the vocabulary is 0 to {self.info.vocab_size - 1}"
            )

    def _output(self, task: "_Task") -> RequestOutput:
        params = task.request.params
        assert task.finish_reason is not None
        text = task.text
        if text is None:
            decodes = params.detokenize and self._has_tokenizer
            text = self.tokenizer.decode(task.token_ids) if decodes else ""
        asked = params.prompt_logprobs is not None
        return RequestOutput(
            prompt=task.prompt,
            prompt_token_ids=task.request.prompt_token_ids,
            text=text,
            token_ids=tuple(task.token_ids),
            finish_reason=task.finish_reason,
            logprobs=None if params.logprobs is None else tuple(task.logprobs),
            prompt_logprobs=(None, *task.prompt_logprobs) if asked else None,
        )


@dataclass(slots=True, eq=False)
class _Task:
    """A request under way, with what it has brought so far."""

    prompt: str | None
    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    text: str | None = None

    def take(self, update: Update) -> None:
        """Adds what a step brought."""
        if update.token_id is not None:
            self.token_ids.append(update.token_id)
        if update.logprob is not None:
            self.logprobs.append(update.logprob)
        self.prompt_logprobs += update.prompt_logprobs
        self.finish_reason = update.finish_reason


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is a single prompt: a text, or ids."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
