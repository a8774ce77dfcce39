"""The one place that decides what every rank does in every step. No torch, no model."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from isomoe.engine.kv_cache import PagePool, pages_for
from isomoe.engine.outputs import FinishReason
from isomoe.engine.step import GroupStep, Joined, Request, Step, StepShape
from isomoe.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a scheduler may not exceed; each holds for every attention-DP group by itself.

    Attributes:
        attn_dp_size: the groups.
        num_pages: pages of the KV cache.
        page_size: tokens of a page.
        max_running_requests: requests that hold pages at once.
        token_budget: tokens of a step.
    """

    attn_dp_size: int
    num_pages: int
    page_size: int
    max_running_requests: int
    token_budget: int


class Advance(NamedTuple):
    """What a step did for one request.

    Attributes:
        token_id: the new token; None for a request that only scores its prompt.
        finish_reason: None if it goes on.
    """

    request_id: int
    token_id: int | None
    finish_reason: FinishReason | None


@dataclass(slots=True, eq=False)
class _Running:
    """A request that holds pages.

    Attributes:
        computed: its tokens whose keys are cached, this step's included once it is scheduled.
        known: its tokens so far.
    """

    request: Request
    pages: tuple[int, ...]
    computed: int
    known: int


class _Group:
    """One attention-DP group."""

    def __init__(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.running: list[_Running] = []
        self.joined: list[Joined] = []
        self.left: list[int] = []

    def load(self, page_size: int) -> int:
        """Tokens that it has room reserved for, and prompt tokens that it has yet to compute."""
        waiting = sum(max(0, r.known - r.computed) for r in self.running)
        return self.pool.num_used * page_size + waiting


class Scheduler:
    """Forms the batch of every attention-DP group in each step.

    Requests wait in one queue, first come, first served. The first goes to the least loaded group
    that has room for all the tokens that it may ever have, so that none is ever put back. In a
    step, requests in decode come first, then prompts, in chunks if need be.

    Args:
        choose: rows of each group -> index of the regime (`Plan.choose`).
    """

    def __init__(self, limits: Limits, choose: Callable[[Sequence[int]], int]) -> None:
        self.limits = limits
        self._choose = choose
        self._groups = [_Group(limits.num_pages) for _ in range(limits.attn_dp_size)]
        self._waiting: deque[Request] = deque()
        self._place: dict[int, tuple[_Group, _Running]] = {}

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._waiting) or bool(self._place)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no pages yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> tuple[int, ...]:
        """Requests of each group that hold pages."""
        return tuple(len(group.running) for group in self._groups)

    def check_fits(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raises RequestError if the KV cache could never hold such a request."""
        need = pages_for(prompt_tokens + max_tokens, self.limits.page_size)
        if need > self.limits.num_pages:
            raise RequestError(
                f"{prompt_tokens} prompt tokens and max_tokens {max_tokens} need {need} pages of "
                f"{self.limits.page_size} tokens, the KV cache has {self.limits.num_pages}; fewer "
                "tokens or a larger --max-total-tokens would work"
            )

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: if the KV cache could never hold it.
        """
        self.check_fits(len(request.prompt_token_ids), request.max_tokens)
        self._waiting.append(request)

    def remove(self, request_id: int) -> None:
        """Ends a request early; an id that has ended already is ignored."""
        if request_id in self._place:
            self._end(request_id)
        else:
            self._waiting = deque(r for r in self._waiting if r.request_id != request_id)

    def schedule(self) -> Step | None:
        """The next step; None if there is nothing to do.

        What it schedules counts as computed: run it, then call `update`.
        """
        self._admit()
        if not self._place:
            return None
        parts, logits_rows = [], []
        for group in self._groups:
            part, chosen = self._group_step(group)
            parts.append(part)
            logits_rows.append(chosen)
        rows = tuple([sum(part.num_tokens) for part in parts])
        shape = StepShape(
            rows=rows, padded=None, logits_rows=tuple(logits_rows), regime=self._choose(rows)
        )
        return Step(shape=shape, groups=tuple(parts))

    def update(self, step: Step, token_ids: Sequence[Sequence[int]]) -> list[list[Advance]]:
        """Takes in what a step sampled.

        Args:
            token_ids: for each group, one for each of its requests that samples, in row order.

        Returns:
            For each group, what changed: an entry for each request that samples or has ended.
        """
        return [
            self._advance(part, tokens) for part, tokens in zip(step.groups, token_ids, strict=True)
        ]

    def check(self) -> None:
        """Asserts that no page is lost or held twice, and that no limit is exceeded."""
        for group in self._groups:
            group.pool.check([r.pages for r in group.running])
            assert len(group.running) <= self.limits.max_running_requests

    def _admit(self) -> None:
        limits = self.limits
        while self._waiting:
            request = self._waiting[0]
            tokens = len(request.prompt_token_ids) + request.max_tokens
            need = pages_for(tokens, limits.page_size)
            able = [
                group
                for group in self._groups
                if len(group.running) < limits.max_running_requests and group.pool.num_free >= need
            ]
            if not able:
                return
            group = min(able, key=lambda group: group.load(limits.page_size))
            self._waiting.popleft()
            pages = group.pool.allocate(need)
            member = _Running(request, pages, 0, len(request.prompt_token_ids))
            group.running.append(member)
            group.joined.append(Joined(request=request, pages=pages))
            self._place[request.request_id] = group, member

    def _group_step(self, group: _Group) -> tuple[GroupStep, tuple[int, ...]]:
        budget = self.limits.token_budget
        chosen: list[_Running] = []
        num_tokens: list[int] = []
        decoding = [r for r in group.running if r.known - r.computed == 1 and r.computed]
        # Who decodes has had rows beside all others who do, so that they fit the budget.
        assert len(decoding) <= budget
        for member in decoding:
            chosen.append(member)
            num_tokens.append(1)
        budget -= len(decoding)
        if len(decoding) < len(group.running):
            for member in group.running:
                if budget and (member.known - member.computed > 1 or not member.computed):
                    chosen.append(member)
                    num_tokens.append(min(budget, member.known - member.computed))
                    budget -= num_tokens[-1]
        num_logits: list[int] = []
        samples: list[bool] = []
        logits_rows: list[int] = []
        row = 0
        for member, tokens in zip(chosen, num_tokens, strict=True):
            request = member.request
            prefill = member.computed < len(request.prompt_token_ids)
            member.computed += tokens
            row += tokens
            last = member.computed == member.known and request.max_tokens > 0
            scored = prefill and request.params.prompt_logprobs is not None
            wanted = tokens if scored else int(last)
            num_logits.append(wanted)
            samples.append(last)
            logits_rows.extend(range(row - wanted, row))
        part = GroupStep(
            joined=tuple(group.joined),
            left=tuple(group.left),
            request_ids=tuple([member.request.request_id for member in chosen]),
            num_tokens=tuple(num_tokens),
            num_logits=tuple(num_logits),
            samples=tuple(samples),
        )
        group.joined.clear()
        group.left.clear()
        return part, tuple(logits_rows)

    def _advance(self, part: GroupStep, token_ids: Sequence[int]) -> list[Advance]:
        tokens = iter(token_ids)
        advances = []
        for request_id, samples in zip(part.request_ids, part.samples, strict=True):
            token = next(tokens) if samples else None
            place = self._place.get(request_id)
            if place is None:  # removed while the step ran
                continue
            member = place[1]
            request = member.request
            reason = None
            if token is not None:
                member.known += 1
                if token in request.stop_ids:
                    reason = FinishReason.STOP
                elif member.known - len(request.prompt_token_ids) >= request.max_tokens:
                    reason = FinishReason.LENGTH
            elif request.max_tokens == 0 and member.computed == member.known:
                reason = FinishReason.LENGTH
            else:
                continue
            if reason is not None:
                self._end(request_id)
            advances.append(Advance(request_id, token, reason))
        return advances

    def _end(self, request_id: int) -> None:
        group, member = self._place.pop(request_id)
        group.running.remove(member)
        group.pool.release(member.pages)
        for index, joined in enumerate(group.joined):
            if joined.request is member.request:  # no worker has heard of it
                del group.joined[index]
                return
        group.left.append(request_id)
