"""The one place that decides what every rank does in every step. No torch, no model."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from isomoe.engine.generation import Autoregressive, Generation, Rows
from isomoe.engine.kv_cache import PagePool, pages_for
from isomoe.engine.outputs import Update
from isomoe.engine.prefix_cache import Node, PrefixCache
from isomoe.engine.step import (
    MAX_SCORED_ROWS,
    GroupOutput,
    GroupStep,
    Joined,
    Request,
    Schedule,
    Step,
    StepShape,
)
from isomoe.errors import RequestError

_OVERLOAD = 1.5
"""A group this much more loaded than the least gets no request for the sake of its prefixes."""
_DECODE = Rows(tokens=1, wanted=1, drawn=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a scheduler may not exceed; each holds for every attention-DP group by itself.

    Attributes:
        attn_dp_size: the groups.
        num_pages: pages of the KV cache.
        page_size: tokens of a page.
        max_running_requests: requests that hold pages at once.
        chunked_prefill_size: tokens of one request in a step.
        max_prefill_tokens: tokens of all requests in a step that are not in decode; those in
            decode have one each beside these.
        headroom_tokens: how far all running requests must be able to grow for one more to join.
        prefix_cache: whether requests that begin alike share pages.
        max_scored_rows: rows of a step whose logits are wanted for prompt tokens, or for blocks.
        graph_rows: ascending; a step that only decodes, and has at most so many rows in each group,
            is padded to the next of these in every group. Empty: nothing is padded.
    """

    attn_dp_size: int
    num_pages: int
    page_size: int
    max_running_requests: int
    chunked_prefill_size: int
    max_prefill_tokens: int
    headroom_tokens: int = 128
    prefix_cache: bool = True
    max_scored_rows: int = MAX_SCORED_ROWS
    graph_rows: tuple[int, ...] = ()

    def check_fits(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raises RequestError if the KV cache could never hold such a request."""
        need = pages_for(prompt_tokens + max_tokens, self.page_size)
        if need > self.num_pages:
            raise RequestError(
                f"{prompt_tokens} prompt tokens and max_tokens {max_tokens} need {need} pages of "
                f"{self.page_size} tokens, the KV cache has {self.num_pages}; fewer "
                "tokens or a larger --max-total-tokens would work"
            )


class GroupState(NamedTuple):
    """The KV cache and the requests of one attention-DP group. free + cached + used = total.

    Attributes:
        cached_pages: pages of prefixes that no request uses; as good as free.
    """

    running: int
    total_pages: int
    free_pages: int
    cached_pages: int
    used_pages: int


@dataclass(slots=True, eq=False)
class _Member:
    """A request, waiting or running.

    Attributes:
        text: its tokens, and which rows it runs next.
        group: where it runs; None while it waits.
        pages: in the order of its tokens.
        nodes: of its first pages, which belong to the prefix cache; the others are its own.
        publish_at: when so many tokens are computed, one more page is full for the prefix cache.
        cached: prompt tokens that it found in the cache when it first ran; None until it has run.
    """

    request: Request
    text: Generation
    group: "_Group | None" = None
    pages: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    publish_at: float = math.inf
    cached: int | None = None


class _Group:
    """One attention-DP group: its pages, and who runs.

    Attributes:
        running: in the order in which they joined.
        schedule: of the last step.
        steady: whether every running request had one row of decode in it, and none has come or
            gone since.
        table: what changed in the block tables: (request id, place, page).
    """

    def __init__(self, limits: Limits) -> None:
        self.cache = PrefixCache(PagePool(limits.num_pages), limits.page_size)
        self.running: list[_Member] = []
        self.joined: list[Joined] = []
        self.left: list[int] = []
        self.table: list[tuple[int, int, int]] = []
        self.schedule = Schedule()
        self.steady = False

    def load(self) -> int:
        """Tokens that its requests hold, and those that they have yet to compute."""
        texts = [member.text for member in self.running]
        return sum(2 * len(text.tokens) - text.computed for text in texts)

    def part(self, schedule: Schedule | None) -> GroupStep:
        """What the workers must hear; from here on they have heard it."""
        part = GroupStep(
            left=tuple(self.left),
            joined=tuple(self.joined),
            table=tuple(self.table),
            schedule=schedule,
        )
        self.left.clear()
        self.joined.clear()
        self.table.clear()
        return part


class Scheduler:
    """Forms the batch of every attention-DP group in each step.

    Requests wait in one queue, first come, first served. The first one goes to the group that has
    most of its prefix in the cache, unless that one is overloaded, else to the least loaded. It
    joins once the group has pages for all its tokens and for some growth of everybody. In a step,
    requests in decode have a row each, and prompts and blocks share what the budget leaves, in
    chunks if need be. If a group's pages run out nevertheless, its youngest request is retracted:
    its pages are given back, and it waits at the head of the queue with what it has generated.

    Args:
        choose: rows of each group -> index of the regime (`Plan.choose`).
        generation: the kind of generation.
    """

    def __init__(
        self,
        limits: Limits,
        choose: Callable[[Sequence[int]], int],
        generation: Callable[[Request], Generation] = Autoregressive,
    ) -> None:
        self.limits = limits
        self.num_retracted = 0
        self._choose = choose
        self._generation = generation
        self._groups = [_Group(limits) for _ in range(limits.attn_dp_size)]
        self._waiting: deque[_Member] = deque()
        self._members: dict[int, _Member] = {}
        self._shape: StepShape | None = None

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._members)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no pages."""
        return len(self._waiting)

    @property
    def num_running(self) -> tuple[int, ...]:
        """Requests of each group that hold pages."""
        return tuple(len(group.running) for group in self._groups)

    def state(self) -> list[GroupState]:
        """Each group's pages and requests."""
        states = []
        for group in self._groups:
            total, free = self.limits.num_pages, group.cache.pool.num_free
            unused = group.cache.num_unused
            used = total - free - unused
            states.append(GroupState(len(group.running), total, free, unused, used))
        return states

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: if the KV cache could never hold it.
        """
        self.limits.check_fits(len(request.prompt_token_ids), request.max_tokens)
        member = _Member(request, self._generation(request))
        self._members[request.request_id] = member
        self._waiting.append(member)

    def remove(self, request_id: int) -> None:
        """Ends a request early; its pages are free for the next step. An unknown id is ignored."""
        member = self._members.pop(request_id, None)
        if member is None:
            return
        if member.group is None:
            self._waiting.remove(member)
        else:
            self._leave(member)

    def flush_cache(self) -> bool:
        """Forgets all prefixes, unless requests are about; whether it did."""
        if self.has_work:
            return False
        for group in self._groups:
            group.cache.clear()
        return True

    def schedule(self) -> Step | None:
        """The next step; None if there is nothing to do, or nothing before the next `update`.

        What it schedules counts as computed: run it, then call `update`. The next one may be
        scheduled before that, if steps are run and told of in order.
        """
        self._admit()
        for group in self._groups:
            self._make_room(group)
        if not any(member.text.can_run for group in self._groups for member in group.running):
            waits = self._waiting and not any(group.running for group in self._groups)
            assert not waits, "requests wait, and no group has room"
            return None
        parts = tuple([self._group_step(group) for group in self._groups])
        schedules = tuple([group.schedule for group in self._groups])
        if self._shape is None or any(part.schedule is not None for part in parts):
            self._shape = self._form_shape(schedules)
        return Step(shape=self._shape, groups=parts, schedules=schedules)

    def update(self, step: Step, outputs: Sequence[GroupOutput]) -> list[list[Update]]:
        """Takes in what a step sampled: the answers of the groups.

        Returns:
            For each group, what changed: an entry for each request that has new tokens or ended.
        """
        return [
            self._advance(schedule, output)
            for schedule, output in zip(step.schedules, outputs, strict=True)
        ]

    def check(self) -> None:
        """Asserts that no page is lost or held twice, and that no limit is exceeded."""
        for group in self._groups:
            own = [page for member in group.running for page in member.pages[len(member.nodes) :]]
            nodes = group.cache.pages()
            for member in group.running:
                assert [node.page for node in member.nodes] == member.pages[: len(member.nodes)]
            assert len(nodes) == group.cache.num_nodes
            group.cache.pool.check([*own, *nodes])
            used = {id(node) for member in group.running for node in member.nodes}
            assert len(nodes) - len(used) == group.cache.num_unused
            assert len(group.running) <= self.limits.max_running_requests

    def _admit(self) -> None:
        while self._waiting:
            member = self._waiting[0]
            place = self._place(member)
            if place is None:
                return
            self._waiting.popleft()
            self._join(member, *place)

    def _place(self, member: _Member) -> tuple[_Group, list[Node]] | None:
        """The group for a request and the prefix that it finds there; None if none has room."""
        able = []
        for group in self._groups:
            if len(group.running) < self.limits.max_running_requests:
                nodes = group.cache.match(member.text.tokens, member.text.reusable)
                if self._has_room(group, member, nodes):
                    able.append((group.load(), group, nodes))
        if not able:
            return None
        least = min(able, key=lambda one: one[0])
        best = min(able, key=lambda one: (-len(one[2]), one[0]))
        slack = self.limits.chunked_prefill_size
        _, group, nodes = best if best[0] <= _OVERLOAD * least[0] + slack else least
        return group, nodes

    def _has_room(self, group: _Group, member: _Member, nodes: list[Node]) -> bool:
        size = self.limits.page_size
        available = group.cache.num_available - sum(not node.refs for node in nodes)
        wanted = -len(nodes) - sum(len(one.pages) for one in group.running)
        for one in (*group.running, member):
            ahead = one.text.length + self.limits.headroom_tokens
            wanted += pages_for(min(ahead, one.text.end), size)
        return wanted <= available or not group.running

    def _join(self, member: _Member, group: _Group, nodes: list[Node]) -> None:
        cache, text = group.cache, member.text
        cache.acquire(nodes)
        member.nodes = nodes
        need = pages_for(len(text.tokens), self.limits.page_size) - len(nodes)
        member.pages = [*[node.page for node in nodes], *cache.allocate(need)]
        text.computed = len(nodes) * self.limits.page_size
        if self.limits.prefix_cache:
            member.publish_at = text.computed + self.limits.page_size
        if member.cached is None:
            member.cached = text.computed
        assert not text.under_way, "a request came back before its step was told of"
        member.group = group
        group.running.append(member)
        group.steady = False
        prompt = len(member.request.prompt_token_ids)
        group.joined.append(
            Joined(
                request=member.request,
                output_ids=tuple(text.tokens[prompt:]),
                pages=tuple(member.pages),
                computed=text.computed,
            )
        )

    def _group_step(self, group: _Group) -> GroupStep:
        if group.steady:
            for member in group.running:
                member.text.decode()
            return group.part(None)
        chosen = [member for member in group.running if member.text.decodes and member.text.can_run]
        group.steady = len(chosen) == len(group.running)
        rows = [_DECODE] * len(chosen)
        for member in chosen:
            member.text.decode()
        budget = self.limits.max_prefill_tokens
        scored_budget = self.limits.max_scored_rows
        for member in () if group.steady else group.running:
            text = member.text
            if text.decodes or not budget or not text.can_run:
                continue
            piece = text.rows(min(budget, self.limits.chunked_prefill_size), scored_budget)
            if piece is None:
                continue
            budget -= piece.tokens
            scored_budget -= piece.scored
            chosen.append(member)
            rows.append(piece)
        group.schedule = Schedule(
            request_ids=tuple([member.request.request_id for member in chosen]),
            num_tokens=tuple([piece.tokens for piece in rows]),
            num_logits=tuple([piece.wanted for piece in rows]),
            samples=tuple([piece.drawn for piece in rows]),
        )
        return group.part(group.schedule)

    def _make_room(self, group: _Group) -> None:
        """Sees to it that every request has pages for its next rows."""
        size = self.limits.page_size
        index = 0
        while index < len(group.running):
            member = group.running[index]
            index += 1
            if not member.text.can_run:
                group.steady = False
            elif member.text.length > len(member.pages) * size:
                while not group.cache.num_available:
                    self._retract(group.running[-1])
                if member.group is None:
                    return
                (page,) = group.cache.allocate(1)
                group.table.append((member.request.request_id, len(member.pages), page))
                member.pages.append(page)

    def _retract(self, member: _Member) -> None:
        """Takes a request's pages back; it joins again before all who wait."""
        self.num_retracted += 1
        self._leave(member)
        self._waiting.appendleft(member)

    def _advance(self, schedule: Schedule, output: GroupOutput) -> list[Update]:
        members = self._members
        updates: list[Update] = []
        at = 0
        for request_id, drawn in zip(schedule.request_ids, schedule.samples, strict=True):
            begin, at = at, at + drawn
            member = members.get(request_id)
            if member is None:  # removed while the step ran
                continue
            text = member.text
            brought = text.take(output.token_ids[begin:at], output.logprobs[begin:at])
            if text.computed >= member.publish_at:
                self._publish(member)
            if not brought.token_ids and brought.reason is None:
                continue
            cached = member.cached or 0
            if cached:
                member.cached = 0
            if brought.reason is not None:
                self.remove(request_id)
            updates.append(
                Update(request_id, brought.token_ids, brought.reason, cached, brought.logprobs)
            )
        assert at == len(output.token_ids), "an answer to another step"
        return updates

    def _publish(self, member: _Member) -> None:
        """Gives its full pages to the prefix cache.

        Where that has a page with the same content, by a request that was prefilled beside this
        one, this one goes on with that and gives its own back.
        """
        group = member.group
        assert group is not None
        for index in range(len(member.nodes), member.text.computed // self.limits.page_size):
            page = member.pages[index]
            node = group.cache.extend(member.nodes, member.text.tokens, page)
            member.nodes.append(node)
            if node.page != page:
                group.cache.pool.release([page])
                member.pages[index] = node.page
                group.table.append((member.request.request_id, index, node.page))
        member.publish_at = (len(member.nodes) + 1) * self.limits.page_size

    def _leave(self, member: _Member) -> None:
        group = member.group
        assert group is not None
        group.running.remove(member)
        group.steady = False
        group.cache.pool.release(member.pages[len(member.nodes) :])
        group.cache.release(member.nodes)
        member.group, member.pages, member.nodes = None, [], []
        member.text.rewind()
        request_id = member.request.request_id
        group.table = [change for change in group.table if change[0] != request_id]
        for index, joined in enumerate(group.joined):
            if joined.request is member.request:  # no worker has heard of it
                del group.joined[index]
                return
        group.left.append(request_id)

    def _form_shape(self, schedules: Sequence[Schedule]) -> StepShape:
        rows = tuple([sum(schedule.num_tokens) for schedule in schedules])
        held = self._graph_rows(rows, schedules)
        if held is None:
            logits_rows = tuple([_logits_rows(schedule) for schedule in schedules])
            return StepShape(
                rows=rows, padded=None, logits_rows=logits_rows, regime=self._choose(rows)
            )
        return StepShape(
            rows=rows,
            padded=(held,) * len(rows),
            logits_rows=(tuple(range(held)),) * len(rows),
            regime=self._choose((held,) * len(rows)),
        )

    def _graph_rows(self, rows: Sequence[int], schedules: Sequence[Schedule]) -> int | None:
        """Rows of each group in a captured step; None for one that cannot be captured."""
        most = max(rows)
        if not self.limits.graph_rows or most > self.limits.graph_rows[-1]:
            return None
        if not all(all(group.samples) for group in schedules) or any(
            sum(group.num_tokens) > len(group.num_tokens) for group in schedules
        ):
            return None
        return next(size for size in self.limits.graph_rows if size >= most)


def _logits_rows(schedule: Schedule) -> tuple[int, ...]:
    """Places of the rows that get logits, ascending."""
    if schedule.num_logits == schedule.num_tokens:
        return tuple(range(sum(schedule.num_tokens)))
    places: list[int] = []
    row = 0
    for tokens, wanted in zip(schedule.num_tokens, schedule.num_logits, strict=True):
        row += tokens
        places.extend(range(row - wanted, row))
    return tuple(places)
