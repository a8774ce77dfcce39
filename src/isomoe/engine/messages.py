"""What goes over the pipe between the engine core and a worker process."""

from dataclasses import dataclass

from isomoe.config import EngineConfig
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.step import GroupStep, StepShape
from isomoe.errors import IsomoeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The first message to a worker process."""

    config: EngineConfig
    info: ModelInfo
    rank: int
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """Tensors that rank 0 has read."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A worker has its weights.

    Attributes:
        available_bytes: memory that its KV cache may take.
    """

    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocateCache:
    """The second message to a worker process.

    Attributes:
        graph_rows: the numbers of rows that steps are captured for.
    """

    num_pages: int
    graph_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReady:
    """A worker is ready for steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStep:
    """A step as the ranks of one attention-DP group get it.

    Attributes:
        shape: None repeats the last one.
    """

    shape: StepShape | None
    group: GroupStep


@dataclass(frozen=True, slots=True, kw_only=True)
class CountExperts:
    """Asks a rank how often its experts were chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsCounted:
    """A rank's answer.

    Attributes:
        load: for each layer with experts, [E] how often this rank served each.
    """

    load: dict[int, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The last message to a worker process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A worker raised, and ends.

    Attributes:
        error: what it raised, if it is one of isomoe's own.
        summary: the exception in one line.
        trace: the traceback.
        at_seconds: the host's monotonic clock; the first failure is the cause of the others.
    """

    error: IsomoeError | None
    summary: str
    trace: str
    at_seconds: float
