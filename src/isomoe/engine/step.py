"""One step of the replica, as the scheduler decides it and as the workers answer it."""

from dataclasses import dataclass, field

from isomoe.engine.outputs import TokenLogprob
from isomoe.engine.sampling_params import SamplingParams

MAX_SCORED_ROWS = 1024
"""Rows of an attention-DP group in a step that get logits for the sake of prompt tokens: bounds the
memory that logits take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request inside the engine, with everything left open decided.

    Attributes:
        request_id: unique in the engine's life.
        prompt_token_ids: at least one.
        params: as the user gave them.
        max_tokens: what they ask for, cut to the context length.
        stop_ids: the tokens that end it.
        seed: of its draws.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A request that an attention-DP group runs from this step on.

    Attributes:
        output_ids: what it has generated already, if it was retracted and comes back.
        pages: those that it has by now.
        computed: its first tokens whose keys those pages hold.
    """

    request: Request
    output_ids: tuple[int, ...]
    pages: tuple[int, ...]
    computed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Which rows an attention-DP group runs.

    The columns have one entry for each request that has rows in the step.

    Attributes:
        request_ids: who has rows, in row order.
        num_tokens: how many each has.
        num_logits: how many of each one's last rows get logits.
        samples: from how many of each one's last rows a token is drawn.
    """

    request_ids: tuple[int, ...] = ()
    num_tokens: tuple[int, ...] = ()
    num_logits: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStep:
    """One attention-DP group's part of a step, as what has changed since the last one.

    Attributes:
        left: ids of requests that ended or were retracted; they go before any joins.
        joined: requests that are new, or come back.
        table: (request id, place, page) for each page that takes a place in a block table.
        schedule: None repeats the last one.
    """

    left: tuple[int, ...] = ()
    joined: tuple[Joined, ...] = ()
    table: tuple[tuple[int, int, int], ...] = ()
    schedule: Schedule | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What every rank must know of a step.

    Attributes:
        rows: tokens of each attention-DP group.
        padded: rows of each group with its padding; None pads nothing.
        logits_rows: for each group, ascending places of the rows that get logits.
        regime: index of the plan's regime.
    """

    rows: tuple[int, ...]
    padded: tuple[int, ...] | None
    logits_rows: tuple[tuple[int, ...], ...]
    regime: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the replica.

    Attributes:
        shape: the same object as the last step's, if it is equal.
        groups: the part of each attention-DP group.
        schedules: the schedule of each, whether it is in its part or repeated.
    """

    shape: StepShape
    groups: tuple[GroupStep, ...]
    schedules: tuple[Schedule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOutput:
    """What an attention-DP group answers to a step.

    Attributes:
        token_ids: one for each row that is drawn from, in row order; -1 for one of a block whose
            mask stays.
        logprobs: the same, None where not asked for; empty if nobody asked.
        prompt_logprobs: by request id, those of the prompt tokens that follow this step's rows.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
