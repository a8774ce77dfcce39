"""The scheduler as a plain class, with made-up tokens instead of a model.

Whatever the requests: every one ends, its tokens are run once and in order, no page is lost or
held twice, no budget is exceeded, and a group with nothing to do gets an empty part.
"""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isomoe.engine.outputs import FinishReason
from isomoe.engine.sampling_params import SamplingParams
from isomoe.engine.scheduler import Limits, Scheduler
from isomoe.engine.step import Request, Step
from isomoe.errors import RequestError

STOP_TOKEN = 7


def limits(**changes: int) -> Limits:
    sizes = {
        "attn_dp_size": 1,
        "num_pages": 64,
        "page_size": 4,
        "max_running_requests": 8,
        "token_budget": 32,
    }
    return Limits(**(sizes | changes))


def request(
    request_id: int, prompt: int, max_tokens: int, prompt_logprobs: bool = False
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if prompt_logprobs else None)
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(range(prompt)),
        params=params,
        max_tokens=max_tokens,
        stop_ids=frozenset({STOP_TOKEN}),
    )


class Mirror:
    """What a worker would know: checks every step against it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running: list[dict[int, Request]] = [{} for _ in range(limits.attn_dp_size)]
        self.pages: dict[int, tuple[int, ...]] = {}
        self.computed: dict[int, int] = {}
        self.known: dict[int, int] = {}
        self.left: list[int] = []

    def check(self, step: Step) -> None:
        assert len(step.groups) == self.limits.attn_dp_size
        assert step.shape.regime == sum(step.shape.rows)
        for running, part, rows, chosen in zip(
            self.running, step.groups, step.shape.rows, step.shape.logits_rows, strict=True
        ):
            for request_id in part.left:
                del running[request_id], self.pages[request_id]
                self.left.append(request_id)
            for joined in part.joined:
                request = joined.request
                running[request.request_id] = request
                self.pages[request.request_id] = joined.pages
                self.computed[request.request_id] = 0
                self.known[request.request_id] = len(request.prompt_token_ids)
            held = [page for request_id in running for page in self.pages[request_id]]
            assert len(set(held)) == len(held) <= self.limits.num_pages
            assert len(running) <= self.limits.max_running_requests
            assert sum(part.num_tokens) == rows <= self.limits.token_budget
            assert len(set(part.request_ids)) == len(part.request_ids)
            if not running:
                assert not part.request_ids
                assert not chosen
            self._check_rows(running, part, chosen)

    def _check_rows(self, running: dict[int, Request], part, chosen: Sequence[int]) -> None:
        expected, row = [], 0
        for request_id, tokens, wanted, samples in zip(
            part.request_ids, part.num_tokens, part.num_logits, part.samples, strict=True
        ):
            request = running[request_id]
            assert tokens > 0
            prefill = self.computed[request_id] < len(request.prompt_token_ids)
            self.computed[request_id] += tokens
            assert self.computed[request_id] <= self.known[request_id]
            done = self.computed[request_id] == self.known[request_id]
            assert samples == (done and request.max_tokens > 0)
            if prefill and request.params.prompt_logprobs is not None:
                assert wanted == tokens
            else:
                assert wanted == int(samples)
            row += tokens
            expected += range(row - wanted, row)
            self.known[request_id] += samples
            capacity = len(self.pages[request_id]) * self.limits.page_size
            assert self.known[request_id] <= capacity
        assert list(chosen) == expected


SIZES = st.tuples(st.integers(1, 40), st.integers(0, 12), st.booleans())


@given(
    groups=st.integers(1, 3),
    budget=st.integers(1, 24),
    most=st.integers(1, 5),
    arrivals=st.lists(st.lists(SIZES, max_size=4), min_size=1, max_size=6),
    data=st.data(),
)
def test_every_request_ends_and_nothing_is_exceeded(groups, budget, most, arrivals, data) -> None:
    bounds = limits(
        attn_dp_size=groups, num_pages=16, max_running_requests=most, token_budget=budget
    )
    scheduler = Scheduler(bounds, choose=sum)
    mirror = Mirror(bounds)
    requests: dict[int, Request] = {}
    reasons: dict[int, FinishReason] = {}
    sampled: dict[int, int] = {}
    removed: set[int] = set()
    for step_index in range(3000):
        for size in arrivals[step_index] if step_index < len(arrivals) else ():
            new = request(len(requests), *size)
            requests[new.request_id] = new
            scheduler.add(new)
        if requests and data.draw(st.integers(0, 19)) == 0 and step_index < 20:
            victim = data.draw(st.sampled_from(sorted(requests)))
            if victim not in reasons:
                scheduler.remove(victim)
                removed.add(victim)
        step = scheduler.schedule()
        if step is None:
            if step_index >= len(arrivals):
                break
            continue
        mirror.check(step)
        tokens = [
            [
                data.draw(st.sampled_from((1, 2, 3, 4, STOP_TOKEN)))
                for drawn in part.samples
                if drawn
            ]
            for part in step.groups
        ]
        for advances in scheduler.update(step, tokens):
            for advance in advances:
                sampled[advance.request_id] = sampled.get(advance.request_id, 0) + (
                    advance.token_id is not None
                )
                stops = advance.token_id == STOP_TOKEN
                assert stops == (advance.finish_reason is FinishReason.STOP)
                if advance.finish_reason is not None:
                    assert advance.request_id not in reasons
                    reasons[advance.request_id] = advance.finish_reason
        scheduler.check()
    assert not scheduler.has_work
    assert set(reasons) | removed == set(requests)
    for request_id, reason in reasons.items():
        if reason is FinishReason.LENGTH:
            assert sampled[request_id] == requests[request_id].max_tokens
    assert all(group.pool.num_used == 0 for group in scheduler._groups)


def run_one_step(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    assert step is not None
    scheduler.update(step, [[1] * sum(part.samples) for part in step.groups])
    return step


def test_a_group_without_requests_gets_an_empty_part() -> None:
    scheduler = Scheduler(limits(attn_dp_size=3), choose=sum)
    scheduler.add(request(0, prompt=5, max_tokens=2))
    step = run_one_step(scheduler)
    assert step.shape.rows == (5, 0, 0)
    assert step.groups[1].request_ids == step.groups[2].request_ids == ()
    assert step.shape.logits_rows == ((4,), (), ())


def test_requests_go_to_the_group_with_the_least_load() -> None:
    scheduler = Scheduler(limits(attn_dp_size=2), choose=sum)
    for request_id, prompt in enumerate((40, 4, 4, 4)):
        scheduler.add(request(request_id, prompt, max_tokens=4))
    step = run_one_step(scheduler)
    assert step.groups[0].request_ids == (0,)
    assert step.groups[1].request_ids == (1, 2, 3)


def test_decodes_go_before_prompts_and_long_prompts_in_chunks() -> None:
    scheduler = Scheduler(limits(token_budget=10), choose=sum)
    scheduler.add(request(0, prompt=3, max_tokens=8))
    run_one_step(scheduler)
    scheduler.add(request(1, prompt=20, max_tokens=2))
    parts = [run_one_step(scheduler).groups[0] for _ in range(3)]
    assert [part.request_ids for part in parts] == [(0, 1)] * 3
    assert [part.num_tokens for part in parts] == [(1, 9), (1, 9), (1, 2)]
    assert [part.samples for part in parts] == [(True, False), (True, False), (True, True)]


def test_a_prompt_waits_while_decodes_take_the_whole_budget() -> None:
    scheduler = Scheduler(limits(token_budget=2), choose=sum)
    for request_id in range(3):
        scheduler.add(request(request_id, prompt=1, max_tokens=3))
    parts = [run_one_step(scheduler).groups[0] for _ in range(6)]
    assert [part.request_ids for part in parts] == [(0, 1)] * 3 + [(2,)] * 3


def test_the_first_in_the_queue_is_not_overtaken() -> None:
    scheduler = Scheduler(limits(num_pages=10), choose=sum)
    scheduler.add(request(0, prompt=20, max_tokens=4))  # 6 pages
    scheduler.add(request(1, prompt=28, max_tokens=4))  # 8 pages: must wait
    scheduler.add(request(2, prompt=4, max_tokens=4))  # would fit
    run_one_step(scheduler)
    assert scheduler.num_running == (1,)
    assert scheduler.num_waiting == 2


def test_a_request_that_never_fits_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(limits(num_pages=2), choose=sum)
    with pytest.raises(RequestError, match=r"9 prompt .* need 3 pages of 4 tokens, .* has 2"):
        scheduler.add(request(0, prompt=9, max_tokens=1))


def test_a_request_removed_before_its_first_step_is_never_heard_of() -> None:
    scheduler = Scheduler(limits(max_running_requests=1), choose=sum)
    scheduler.add(request(0, prompt=4, max_tokens=2))
    scheduler.add(request(1, prompt=4, max_tokens=2))
    scheduler.remove(1)
    joined = []
    while (step := scheduler.schedule()) is not None:
        joined += [one.request.request_id for one in step.groups[0].joined]
        scheduler.update(step, [[1] * sum(step.groups[0].samples)])
    assert joined == [0]
