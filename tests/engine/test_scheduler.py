"""The scheduler as a plain class, with a made-up model in place of a real one.

The made-up worker keeps, for each slot of the KV cache, which tokens its keys stand for, and the
made-up model's next token is a function of all tokens so far. So whatever the requests, arrivals,
cancellations, limits and shared prefixes: every row sees the keys of exactly the tokens before it,
every request ends with the output that it has alone, no page is lost or held twice, and no budget
is exceeded.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isomoe.engine.outputs import FinishReason
from isomoe.engine.sampling_params import SamplingParams
from isomoe.engine.scheduler import Limits, Scheduler
from isomoe.engine.step import GroupOutput, GroupStep, Request, Schedule, Step
from isomoe.errors import RequestError

STOP_TOKEN = 7


def limits(**changes: Any) -> Limits:
    sizes = {
        "attn_dp_size": 1,
        "num_pages": 64,
        "page_size": 4,
        "max_running_requests": 8,
        "chunked_prefill_size": 32,
        "max_prefill_tokens": 32,
    }
    return Limits(**(sizes | changes))


def request(
    request_id: int,
    prompt: int | tuple[int, ...],
    max_tokens: int,
    scored_from: int | None = None,
) -> Request:
    params = SamplingParams(
        max_tokens=max_tokens,
        prompt_logprobs=None if scored_from is None else 0,
        prompt_logprobs_start=scored_from or 0,
    )
    # Prompts of one length differ, unless a test wants them alike.
    ids = (
        tuple(range(100 * request_id, 100 * request_id + prompt))
        if isinstance(prompt, int)
        else prompt
    )
    return Request(
        request_id=request_id,
        prompt_token_ids=ids,
        params=params,
        max_tokens=max_tokens,
        stop_ids=frozenset({STOP_TOKEN}),
    )


def next_token(tokens: Sequence[int]) -> int:
    """The made-up model."""
    return hash(tuple(tokens)) % 23


def alone(request: Request) -> tuple[list[int], FinishReason]:
    """What a request generates."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in request.stop_ids:
            return tokens[len(request.prompt_token_ids) :], FinishReason.STOP
    return tokens[len(request.prompt_token_ids) :], FinishReason.LENGTH


@dataclass
class Member:
    request: Request
    tokens: list[int]
    table: list[int]
    computed: int


@dataclass
class Group:
    """What the workers of one attention-DP group know."""

    limits: Limits
    scored: dict[int, list[int]]
    members: dict[int, Member] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)
    keys: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def run(self, part: GroupStep) -> list[int]:
        """Runs a step, and returns the sampled tokens."""
        for request_id in part.left:
            del self.members[request_id]
        for joined in part.joined:
            tokens = [*joined.request.prompt_token_ids, *joined.output_ids]
            assert joined.request.request_id not in self.members
            assert joined.computed < len(tokens)
            self.members[joined.request.request_id] = Member(
                joined.request, tokens, list(joined.pages), joined.computed
            )
        for request_id, place, page in part.table:
            table = self.members[request_id].table
            table[place : place + 1] = [page]
        self.schedule = part.schedule or self.schedule
        assert len(self.members) <= self.limits.max_running_requests
        columns = zip(
            self.schedule.request_ids,
            self.schedule.num_tokens,
            self.schedule.num_logits,
            self.schedule.samples,
            strict=True,
        )
        prefill = 0
        sampled = []
        scored_rows = 0
        for request_id, tokens, wanted, samples in columns:
            member = self.members[request_id]
            begin, member.computed = member.computed, member.computed + tokens
            assert 0 < tokens <= max(1, self.limits.chunked_prefill_size)
            decodes = begin == len(member.tokens) - 1 >= len(member.request.prompt_token_ids)
            prefill += 0 if decodes else tokens
            self._write(member, begin)
            self._check_sees(member)
            prompt = len(member.request.prompt_token_ids)
            scored = self.scored.setdefault(request_id, [])
            scored += range(member.computed - wanted + 1, min(member.computed + 1, prompt))
            assert wanted >= samples
            scored_rows += wanted - samples
            if samples:
                assert member.computed == len(member.tokens)
                sampled.append(next_token(member.tokens))
                member.tokens.append(sampled[-1])
        assert prefill <= self.limits.max_prefill_tokens
        assert scored_rows <= self.limits.max_scored_rows
        return sampled

    def _write(self, member: Member, begin: int) -> None:
        for position in range(begin, member.computed):
            self.keys[self._slot(member, position)] = tuple(member.tokens[: position + 1])

    def _check_sees(self, member: Member) -> None:
        for position in range(member.computed):
            seen = self.keys.get(self._slot(member, position))
            assert seen == tuple(member.tokens[: position + 1]), (position, seen)

    def _slot(self, member: Member, position: int) -> tuple[int, int]:
        page, offset = divmod(position, self.limits.page_size)
        return member.table[page], offset


class Replica:
    """A scheduler with its made-up workers.

    Args:
        depth: steps that are scheduled before the first of them is told of.
    """

    def __init__(self, limits: Limits, depth: int = 1) -> None:
        self.depth = depth
        self.under_way: deque[tuple[Step, list[list[int]]]] = deque()
        self.scheduler = Scheduler(limits, choose=sum)
        # Of the prompt tokens, in order: a request may come back to another group.
        self.scored: dict[int, list[int]] = {}
        self.groups = [Group(limits, self.scored) for _ in range(limits.attn_dp_size)]
        self.outputs: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.cached: dict[int, int] = {}

    def step(self) -> Step | None:
        while len(self.under_way) < self.depth:
            ahead = self.scheduler.schedule()
            if ahead is None:
                break
            self.under_way.append((ahead, self.launch(ahead)))
        if not self.under_way:
            return None
        step, sampled = self.under_way.popleft()
        self.update(step, sampled)
        return step

    def launch(self, step: Step) -> list[list[int]]:
        sampled = [group.run(part) for group, part in zip(self.groups, step.groups, strict=True)]
        shape = step.shape
        for group, rows, chosen, schedule in zip(
            self.groups, shape.rows, shape.logits_rows, step.schedules, strict=True
        ):
            assert schedule == group.schedule
            assert rows == sum(schedule.num_tokens)
            if shape.padded is None:
                assert len(chosen) == sum(schedule.num_logits)
            else:
                assert all(schedule.samples)
                assert set(schedule.num_tokens) <= {1}
                assert chosen == tuple(range(shape.padded[0]))
        limits = self.scheduler.limits
        if shape.padded is not None:
            held = min(size for size in limits.graph_rows if size >= max(shape.rows))
            assert shape.padded == (held,) * limits.attn_dp_size
        assert shape.regime == sum(shape.padded or shape.rows) > 0
        assert sum(shape.rows) > 0
        return sampled

    def update(self, step: Step, sampled: list[list[int]]) -> None:
        outputs = [GroupOutput(token_ids=tokens) for tokens in sampled]
        for advance in [a for part in self.scheduler.update(step, outputs) for a in part]:
            if advance.token_ids:
                self.outputs.setdefault(advance.request_id, []).extend(advance.token_ids)
            self.cached[advance.request_id] = (
                self.cached.get(advance.request_id, 0) + advance.cached_tokens
            )
            if advance.finish_reason is not None:
                assert advance.request_id not in self.reasons
                self.reasons[advance.request_id] = advance.finish_reason
        self.scheduler.check()

    def run(self) -> list[Step]:
        """Steps until nothing is left to do."""
        steps = []
        while (step := self.step()) is not None:
            steps.append(step)
            assert len(steps) < 5000
        assert not self.scheduler.has_work
        return steps


TAILS = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)
PROMPTS = st.tuples(st.sampled_from((0, 4, 9, 16)), TAILS).map(
    lambda parts: (*range(200, 200 + parts[0]), *parts[1])
)
ARRIVALS = st.tuples(PROMPTS, st.integers(0, 24), st.none() | st.integers(0, 12))


@settings(max_examples=300)
@given(
    groups=st.integers(1, 3),
    pages=st.integers(13, 30),
    chunk=st.integers(1, 12),
    budget=st.integers(1, 24),
    most=st.integers(1, 5),
    headroom=st.sampled_from((1, 6, 40)),
    prefix_cache=st.booleans(),
    scored=st.sampled_from((1, 3, 1024)),
    graph_rows=st.sampled_from(((), (1, 2, 5))),
    depth=st.integers(1, 2),
    arrivals=st.lists(st.lists(ARRIVALS, max_size=5), min_size=1, max_size=8),
    data=st.data(),
)
def test_every_request_gets_the_output_that_it_has_alone(
    groups,
    pages,
    chunk,
    budget,
    most,
    headroom,
    prefix_cache,
    scored,
    graph_rows,
    depth,
    arrivals,
    data,
) -> None:
    replica = Replica(
        limits(
            attn_dp_size=groups,
            num_pages=pages,
            max_running_requests=most,
            chunked_prefill_size=chunk,
            max_prefill_tokens=budget,
            headroom_tokens=headroom,
            prefix_cache=prefix_cache,
            max_scored_rows=scored,
            graph_rows=graph_rows,
        ),
        depth,
    )
    requests: dict[int, Request] = {}
    removed: set[int] = set()
    for arriving in arrivals:
        for prompt, max_tokens, scored_from in arriving:
            new = request(len(requests), prompt, max_tokens, scored_from)
            requests[new.request_id] = new
            replica.scheduler.add(new)
        if requests and data.draw(st.integers(0, 9)) == 0:
            victim = data.draw(st.sampled_from(sorted(requests)))
            if victim not in replica.reasons:
                replica.scheduler.remove(victim)
                removed.add(victim)
        replica.step()
    replica.run()
    assert set(replica.reasons) | removed == set(requests)
    for request_id, reason in replica.reasons.items():
        assert (replica.outputs.get(request_id, []), reason) == alone(requests[request_id])
        params = requests[request_id].params
        if params.prompt_logprobs is not None:
            first = max(1, params.prompt_logprobs_start)
            prompt = len(requests[request_id].prompt_token_ids)
            assert replica.scored.get(request_id, []) == list(range(first, prompt))
    for state in replica.scheduler.state():
        assert state.used_pages == state.running == 0
        assert state.free_pages + state.cached_pages == state.total_pages == pages
        assert prefix_cache or not state.cached_pages
    assert replica.scheduler.flush_cache()
    replica.scheduler.check()
    assert all(state.free_pages == pages for state in replica.scheduler.state())


def test_a_group_without_requests_gets_an_empty_part() -> None:
    replica = Replica(limits(attn_dp_size=3))
    replica.scheduler.add(request(0, prompt=5, max_tokens=2))
    step = replica.step()
    assert step is not None
    assert step.shape.rows == (5, 0, 0)
    assert step.schedules[1] == step.schedules[2] == Schedule()
    assert step.shape.logits_rows == ((4,), (), ())


def test_requests_go_to_the_group_with_the_least_load() -> None:
    replica = Replica(limits(attn_dp_size=2))
    for request_id, prompt in enumerate((40, 4, 4, 4)):
        replica.scheduler.add(request(request_id, prompt, max_tokens=4))
    step = replica.step()
    assert step is not None
    assert [schedule.request_ids for schedule in step.schedules] == [(0,), (1, 2, 3)]


def test_decodes_have_their_row_beside_prompts_in_chunks() -> None:
    replica = Replica(limits(chunked_prefill_size=9, max_prefill_tokens=12))
    replica.scheduler.add(request(0, prompt=3, max_tokens=8))
    replica.step()
    replica.scheduler.add(request(1, prompt=20, max_tokens=2))
    replica.scheduler.add(request(2, prompt=20, max_tokens=2))
    found = [step.schedules[0] for step in (replica.step(), replica.step(), replica.step()) if step]
    assert [schedule.request_ids for schedule in found] == [(0, 1, 2)] * 3
    assert [schedule.num_tokens for schedule in found] == [(1, 9, 3), (1, 9, 3), (1, 2, 9)]
    assert [schedule.samples for schedule in found] == [
        (True, False, False),
        (True, False, False),
        (True, True, False),
    ]


def test_a_steady_decode_step_repeats_the_last_schedule_and_shape() -> None:
    replica = Replica(limits(attn_dp_size=2))
    for request_id in range(4):
        replica.scheduler.add(request(request_id, prompt=4, max_tokens=6))
    replica.step()
    replica.step()
    third, fourth = replica.step(), replica.step()
    assert third is not None
    assert fourth is not None
    assert fourth.shape is third.shape
    assert all(part == GroupStep() for part in fourth.groups)


def test_the_first_in_the_queue_is_not_overtaken() -> None:
    replica = Replica(limits(num_pages=10))
    replica.scheduler.add(request(0, prompt=20, max_tokens=4))  # 6 pages
    replica.scheduler.add(request(1, prompt=28, max_tokens=4))  # 8 pages: must wait
    replica.scheduler.add(request(2, prompt=4, max_tokens=4))  # would fit
    replica.step()
    assert replica.scheduler.num_running == (1,)
    assert replica.scheduler.num_waiting == 2


def test_a_request_that_never_fits_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(limits(num_pages=2), choose=sum)
    with pytest.raises(RequestError, match=r"9 prompt .* need 3 pages of 4 tokens, .* has 2"):
        scheduler.add(request(0, prompt=9, max_tokens=1))


def test_a_request_removed_before_its_first_step_is_never_heard_of() -> None:
    replica = Replica(limits(max_running_requests=1))
    replica.scheduler.add(request(0, prompt=4, max_tokens=2))
    replica.scheduler.add(request(1, prompt=4, max_tokens=2))
    replica.scheduler.remove(1)
    joined = [one.request.request_id for step in replica.run() for one in step.groups[0].joined]
    assert joined == [0]


def test_a_removed_request_frees_its_pages_in_the_next_step() -> None:
    replica = Replica(limits(num_pages=8))
    replica.scheduler.add(request(0, prompt=16, max_tokens=16))
    replica.step()
    replica.scheduler.add(request(1, prompt=16, max_tokens=16))
    replica.step()
    assert replica.scheduler.num_waiting == 1
    replica.scheduler.remove(0)
    replica.step()
    assert replica.scheduler.num_waiting == 0


def test_the_youngest_is_retracted_and_resumes_at_the_head_of_the_queue() -> None:
    replica = Replica(limits(num_pages=8, headroom_tokens=1))
    for request_id in range(3):
        replica.scheduler.add(request(request_id, prompt=7, max_tokens=16))
    replica.step()
    assert replica.scheduler.num_running == (3,)
    while not replica.scheduler.num_retracted:
        replica.step()
    assert list(replica.groups[0].members) == [0, 1]
    replica.scheduler.add(request(3, prompt=7, max_tokens=16))
    replica.run()
    for request_id in range(4):
        expected = alone(request(request_id, prompt=7, max_tokens=16))
        assert (replica.outputs[request_id], replica.reasons[request_id]) == expected
    assert list(replica.reasons).index(2) < list(replica.reasons).index(3)


def test_a_prefix_that_was_computed_is_not_computed_again() -> None:
    replica = Replica(limits())
    shared = tuple(range(300, 318))
    replica.scheduler.add(request(0, (*shared, 1), max_tokens=1))
    replica.run()
    replica.scheduler.add(request(1, (*shared, 2), max_tokens=1))
    (step,) = replica.run()
    assert step.shape.rows == (3,)
    assert (replica.cached[0], replica.cached[1]) == (0, 16)


def test_the_last_prompt_token_is_computed_even_if_it_is_cached() -> None:
    replica = Replica(limits())
    for request_id in range(2):
        replica.scheduler.add(request(request_id, tuple(range(300, 316)), max_tokens=2))
        replica.run()
    assert replica.cached[1] == 12


def test_requests_that_arrive_together_share_the_pages_of_their_prefix() -> None:
    replica = Replica(limits(max_prefill_tokens=64))
    shared = tuple(range(300, 316))
    for request_id in range(3):
        replica.scheduler.add(request(request_id, (*shared, request_id), max_tokens=8))
    replica.step()
    assert replica.scheduler.state()[0].used_pages == 4 + 3


def test_a_wanted_prompt_logprob_is_never_skipped_for_a_cached_prefix() -> None:
    replica = Replica(limits())
    shared = tuple(range(300, 320))
    replica.scheduler.add(request(0, shared, max_tokens=1))
    replica.run()
    replica.scheduler.add(request(1, shared, max_tokens=1, scored_from=9))
    replica.run()
    assert replica.cached[1] == 8
    assert replica.scored[1] == list(range(9, 20))


def test_a_request_goes_where_its_prefix_is_unless_that_group_is_overloaded() -> None:
    replica = Replica(limits(attn_dp_size=2, chunked_prefill_size=8, num_pages=100))
    shared = tuple(range(300, 332))
    replica.scheduler.add(request(0, shared, max_tokens=1))
    replica.run()
    replica.scheduler.add(request(1, (*shared, 5), max_tokens=8))
    replica.step()
    assert replica.scheduler.num_running == (1, 0)
    replica.scheduler.add(request(2, (*shared, 6), max_tokens=8))
    replica.step()
    assert replica.scheduler.num_running == (1, 1)


def test_the_least_recently_used_leaf_goes_first() -> None:
    replica = Replica(limits(num_pages=8))
    for request_id, first in enumerate((400, 500)):
        replica.scheduler.add(request(request_id, tuple(range(first, first + 12)), max_tokens=1))
        replica.run()
    replica.scheduler.add(request(2, tuple(range(400, 413)), max_tokens=1))  # uses the first again
    replica.run()
    replica.scheduler.add(request(3, tuple(range(600, 612)), max_tokens=1))  # evicts one page
    replica.run()
    state = replica.scheduler.state()[0]
    assert (state.free_pages, state.cached_pages) == (0, 8)
    # The fourth's last page takes one more of the second's.
    for request_id, first, cached in ((4, 400, 12), (5, 500, 4)):
        replica.scheduler.add(request(request_id, tuple(range(first, first + 13)), max_tokens=1))
        replica.run()
        assert replica.cached[request_id] == cached
