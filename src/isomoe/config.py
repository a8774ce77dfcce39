"""The settings of one engine, as the command line and `LLM` give them."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from isomoe.errors import ConfigError
from isomoe.layout import Parallelism

E = TypeVar("E", bound=StrEnum)

OPENMP_DEFAULTS = {"GOMP_SPINCOUNT": "10000"}
"""What must be in the environment before torch is loaded, where nothing else is. How long threads
that wait for one another spin before they sleep: the default of 300,000 makes small steps many
times slower when anything else wants their cores, and without spinning they are half as fast on
idle ones. docs/benchmarks.md has the figures."""


class LoadFormat(StrEnum):
    """Where weights come from."""

    AUTO = "auto"
    DUMMY = "dummy"


class DType(StrEnum):
    """The model's dtype; AUTO takes the one of config.json."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Device(StrEnum):
    """What the workers run on; AUTO is CUDA where there is a GPU and Triton, else the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class MoeWeightFormat(StrEnum):
    """How experts' weights are kept; AUTO keeps FP8 as the checkpoint has it, on GPUs."""

    AUTO = "auto"
    NONE = "none"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The settings of one engine. What depends on the checkpoint is found out when it starts.

    Attributes:
        model_path: a folder or a hub id; None is the checkpoint that ships with the package.
        parallelism: how the model is split over the ranks.
        load_format: read the checkpoint's weights, or make random ones.
        dtype: of weights, activations and KV cache.
        device: what the workers run on.
        moe_weight_format: how experts' weights are kept: in `dtype`, or in FP8.
        context_length: the most tokens of a request, prompt and output; None takes the model's.
        max_running_requests: the most requests that run at once in each attention-DP group.
        max_total_tokens: tokens that each rank's KV cache holds; None sizes it by memory.
        page_size: tokens of a page of the KV cache; None takes 16, or more where the model's blocks
            need it.
        chunked_prefill_size: the most tokens of one prompt in a step; longer ones are prefilled
            in chunks. None is 2048, and 8192 on GPUs.
        max_prefill_tokens: the most prompt tokens of an attention-DP group in a step; None is
            `chunked_prefill_size`, and twice as many on GPUs.
        disable_radix_cache: compute every prompt in full, instead of looking for a prefix in the
            KV cache.
        mem_fraction_static: the share of a GPU's memory for weights and KV cache; less where the
            activations would not fit beside them.
        disable_cuda_graph: launch every kernel of every step, instead of replaying captured steps.
        cuda_graph_max_bs: steps that decode up to so many requests in each group are captured.
        disable_overlap_schedule: schedule a step only when the one before has ended, on GPUs too.
        watchdog_timeout_seconds: how long a step may take before its silent workers count as dead.
        random_seed: of dummy weights, and of sampling where a request brings no seed.
        deepep_mode: "auto", "normal" or "low_latency", of `--moe-a2a-backend deepep`.
        init_expert_location: a JSON file that says which rank holds which expert, or how often each
            was chosen, from which it is worked out; None: in order.
        record_expert_load: count how often each expert is chosen.
        plan: a JSON file with the plan that is followed, as `isomoe plan --json` prints it; None
            takes the cheapest.
        instrument: `package.module:attribute` of an `engine.Instrument`, or None. With `=ARGUMENT`
            the attribute is called with that text and gives the instrument; several are joined
            by `;`, and a later one wraps what an earlier one has changed.

    Raises:
        ConfigError: if a value is out of range.
    """

    model_path: str | None = None
    parallelism: Parallelism = field(default_factory=Parallelism)
    load_format: LoadFormat = LoadFormat.AUTO
    dtype: DType = DType.AUTO
    device: Device = Device.AUTO
    moe_weight_format: MoeWeightFormat = MoeWeightFormat.AUTO
    context_length: int | None = None
    max_running_requests: int = 256
    max_total_tokens: int | None = None
    page_size: int | None = None
    chunked_prefill_size: int | None = None
    max_prefill_tokens: int | None = None
    disable_radix_cache: bool = False
    mem_fraction_static: float = 0.92
    disable_cuda_graph: bool = False
    cuda_graph_max_bs: int = 256
    disable_overlap_schedule: bool = False
    watchdog_timeout_seconds: float = 300.0
    random_seed: int = 0
    deepep_mode: str = "auto"
    init_expert_location: str | None = None
    record_expert_load: bool = False
    plan: str | None = None
    instrument: str | None = None

    def __post_init__(self) -> None:
        for flag, value in (
            ("--context-length", self.context_length),
            ("--max-running-requests", self.max_running_requests),
            ("--max-total-tokens", self.max_total_tokens),
            ("--page-size", self.page_size),
            ("--chunked-prefill-size", self.chunked_prefill_size),
            ("--max-prefill-tokens", self.max_prefill_tokens),
            ("--cuda-graph-max-bs", self.cuda_graph_max_bs),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value}: must be at least 1")
        if not 0 < self.mem_fraction_static < 1:
            raise ConfigError(
                f"--mem-fraction-static {self.mem_fraction_static}: must be between 0 and 1"
            )
        if not 0 < self.watchdog_timeout_seconds < float("inf"):
            raise ConfigError(
                f"--watchdog-timeout-seconds {self.watchdog_timeout_seconds}: must be above 0 "
                "and finite"
            )
        if self.init_expert_location is not None and self.parallelism.ep_size == 1:
            raise ConfigError(
                "--init-expert-location: there is one group of ranks for all experts; --ep-size "
                "above 1 would give several"
            )
        if self.deepep_mode not in ("auto", "normal", "low_latency"):
            raise ConfigError(
                f"--deepep-mode {self.deepep_mode}: must be one of auto, normal, low_latency"
            )
        if self.random_seed < 0:
            raise ConfigError(f"--random-seed {self.random_seed}: must be at least 0")
        for part in () if self.instrument is None else self.instrument.split(";"):
            if part.partition("=")[0].count(":") != 1:
                raise ConfigError(f"instrument {part!r}: must be package.module:attribute")

    @property
    def expert_flags(self) -> list[str]:
        """The settings that mean nothing to a model without routed experts."""
        flags = self.parallelism.expert_flags
        if self.init_expert_location is not None:
            flags.append(f"--init-expert-location {self.init_expert_location}")
        if self.moe_weight_format is MoeWeightFormat.FP8:
            flags.append(f"--moe-weight-format {self.moe_weight_format}")
        if self.record_expert_load:
            flags.append("recording the experts' load")
        return flags

    def prefill_limits(self, device: str) -> tuple[int, int]:
        """The most tokens in a step on `device`: of one prompt, and of all prompts of a group."""
        chunk = self.chunked_prefill_size or (8192 if device == "cuda" else 2048)
        most = self.max_prefill_tokens or (2 * chunk if device == "cuda" else chunk)
        return chunk, most

    def overlaps(self, device: str) -> bool:
        """Whether a step is scheduled while the one before runs on `device`."""
        return device == "cuda" and not self.disable_overlap_schedule


def choice(kind: type[E], value: str, flag: str) -> E:
    """The member of `kind` that `value` names.

    Raises:
        ConfigError: if there is none; lists them.
    """
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(kind)
        raise ConfigError(f"{flag} {value}: must be one of {known}") from None
