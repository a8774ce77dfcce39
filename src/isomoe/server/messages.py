"""What the front end and the engine process tell each other: MessagePack, by msgspec."""

from typing import Any

from msgspec import Struct

from isomoe.config import EngineConfig
from isomoe.engine import Request, Update
from isomoe.engine.scheduler import GroupState, Limits


class Launch(Struct, tag=True, frozen=True):
    """The first message to the engine process."""

    config: EngineConfig


class Submit(Struct, tag=True, frozen=True):
    """A new request."""

    request: Request


class Cancel(Struct, tag=True, frozen=True):
    """Requests to end early. Ids that have ended are ignored."""

    request_ids: list[int]


class FlushCache(Struct, tag=True, frozen=True):
    """Asks to forget all prefixes; answered by `CacheFlushed`."""


class GetState(Struct, tag=True, frozen=True):
    """Asks for the `EngineState`."""


class StartExpertRecord(Struct, tag=True, frozen=True):
    """Asks to record the experts' load from now on; answered by its `ExpertLoad`."""


class StopExpertRecord(Struct, tag=True, frozen=True):
    """Asks to end the record; answered by its `ExpertLoad`."""


class GetExpertLoad(Struct, tag=True, frozen=True):
    """Asks for the `ExpertLoad` of the record."""


ToEngine = (
    Launch
    | Submit
    | Cancel
    | FlushCache
    | GetState
    | StartExpertRecord
    | StopExpertRecord
    | GetExpertLoad
)


class LoadProgress(Struct, tag=True, frozen=True):
    """Tensors that rank 0 has read."""

    done: int
    total: int


class Ready(Struct, tag=True, frozen=True):
    """The engine takes requests.

    Attributes:
        plan: the plan of its layout, as `isomoe plan --json` gives it.
        worker_pids: process ids of the ranks; empty for a lone rank in the engine process.
    """

    limits: Limits
    plan: dict[str, Any]
    worker_pids: list[int]


class StepStats(Struct, frozen=True):
    """One step of the engine, for the metrics.

    Attributes:
        step_seconds: from its scheduling to its answers.
        rows: tokens of each attention-DP group.
        running: requests of each group that hold pages.
        waiting: requests that hold none.
        retracted: requests that were put back since the engine started.
        used_pages, cached_pages, total_pages: of each group.
        collective_rows: rows that went through each kind of collective, such as
            {"all_reduce 0,1": 96}, by its mesh axes.
    """

    step_seconds: float
    rows: list[int]
    running: list[int]
    waiting: int
    retracted: int
    used_pages: list[int]
    cached_pages: list[int]
    total_pages: list[int]
    collective_rows: dict[str, int]


class StepResult(Struct, tag=True, frozen=True):
    """What a step brought."""

    updates: list[Update]
    stats: StepStats


class EngineState(Struct, tag=True, frozen=True):
    """The engine between two steps."""

    groups: list[GroupState]
    waiting: int
    retracted: int


class CacheFlushed(Struct, tag=True, frozen=True):
    """Whether the prefixes were forgotten; they are not while requests are about."""

    done: bool


class ExpertLoad(Struct, tag=True, frozen=True):
    """What was recorded.

    Attributes:
        counts: how often each expert was chosen: [layers][E], empty for a layer without experts.
    """

    counts: list[list[int]]


class Failed(Struct, tag=True, frozen=True):
    """The engine process ends.

    Attributes:
        kind: the error's class, if it is one of isomoe's own.
        message: why, in one line.
    """

    kind: str
    message: str


FromEngine = LoadProgress | Ready | StepResult | EngineState | CacheFlushed | ExpertLoad | Failed
