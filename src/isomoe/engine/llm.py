"""`LLM`: the engine for programs that have all their prompts at hand."""

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from isomoe.config import Device, DType, EngineConfig, LoadFormat, MoeWeightFormat, choice
from isomoe.engine.core import EngineCore
from isomoe.engine.executor import Progress
from isomoe.engine.intake import Intake
from isomoe.engine.outputs import RequestOutput
from isomoe.engine.reply import Reply, Transcript
from isomoe.engine.sampling_params import SamplingParams
from isomoe.errors import RequestError
from isomoe.layout import A2ABackend, Parallelism, WireFormat
from isomoe.tokenizer import Tokenizer

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
        moe_a2a_backend: str = "none",
        moe_wire_format: str = "none",
        ep_num_redundant_experts: int = 0,
        load_format: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        context_length: int | None = None,
        max_running_requests: int = 256,
        max_total_tokens: int | None = None,
        page_size: int | None = None,
        chunked_prefill_size: int | None = None,
        max_prefill_tokens: int | None = None,
        disable_radix_cache: bool = False,
        mem_fraction_static: float = 0.92,
        disable_cuda_graph: bool = False,
        cuda_graph_max_bs: int = 256,
        disable_overlap_schedule: bool = False,
        watchdog_timeout_seconds: float = 300.0,
        random_seed: int = 0,
        moe_weight_format: str = "auto",
        deepep_mode: str = "auto",
        init_expert_location: str | None = None,
        record_expert_load: bool = False,
        plan: str | None = None,
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
                moe_a2a_backend=choice(A2ABackend, moe_a2a_backend, "--moe-a2a-backend"),
                moe_wire_format=choice(WireFormat, moe_wire_format, "--moe-wire-format"),
                ep_num_redundant_experts=ep_num_redundant_experts,
            ),
            load_format=choice(LoadFormat, load_format, "--load-format"),
            dtype=choice(DType, dtype, "--dtype"),
            device=choice(Device, device, "--device"),
            context_length=context_length,
            max_running_requests=max_running_requests,
            max_total_tokens=max_total_tokens,
            page_size=page_size,
            chunked_prefill_size=chunked_prefill_size,
            max_prefill_tokens=max_prefill_tokens,
            disable_radix_cache=disable_radix_cache,
            mem_fraction_static=mem_fraction_static,
            disable_cuda_graph=disable_cuda_graph,
            cuda_graph_max_bs=cuda_graph_max_bs,
            disable_overlap_schedule=disable_overlap_schedule,
            watchdog_timeout_seconds=watchdog_timeout_seconds,
            random_seed=random_seed,
            moe_weight_format=choice(MoeWeightFormat, moe_weight_format, "--moe-weight-format"),
            deepep_mode=deepep_mode,
            init_expert_location=init_expert_location,
            record_expert_load=record_expert_load,
            plan=plan,
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
        self._intake = Intake(
            self.info, self.core.scheduler.limits, self.tokenizer, config.random_seed
        )
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
        transcripts = [
            self._admit(prompt, one, f"prompt {index}: " if len(several) > 1 else "")  # type: ignore[arg-type]
            for index, (prompt, one) in enumerate(zip(several, each, strict=True))
        ]
        for transcript in transcripts:
            self.core.add(transcript.request)
        try:
            self._run(transcripts, progress)
        except BaseException:
            # A step may be under way, so that nothing can follow it.
            self.shutdown()
            raise
        return [transcript.output() for transcript in transcripts]

    def expert_load(self) -> list[list[int]]:
        """How often each expert was chosen so far: [layers][E], empty for a layer without experts.

        Raises:
            ConfigError: if it is not recorded.
        """
        return self.core.expert_load()

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

    def _run(
        self, transcripts: list[Transcript], progress: Callable[[int, int], None] | None
    ) -> None:
        under_way = {
            one.request.request_id: (Reply(one.request, self.tokenizer), one) for one in transcripts
        }
        while under_way:
            for update in self.core.step():
                reply, transcript = under_way[update.request_id]
                transcript.add(reply.take(update))
                if reply.finish_reason is None:
                    continue
                if update.finish_reason is None:
                    self.core.remove(update.request_id)
                del under_way[update.request_id]
                if progress is not None:
                    progress(len(transcripts) - len(under_way), len(transcripts))

    def _admit(self, prompt: Prompt, params: SamplingParams, name: str) -> Transcript:
        text = prompt if isinstance(prompt, str) else None
        try:
            ids = self._intake.encode(prompt) if isinstance(prompt, str) else prompt
            return Transcript(self._intake.request(ids, params), text)
        except RequestError as error:
            raise RequestError(f"{name}{error}", error.status) from None


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is a single prompt: a text, or ids."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
