"""Many streaming clients at once, some of which go away: nothing is lost, leaked or altered."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import openai
import pytest
from idle import flush, info, wait_idle

from isomoe.eval import find_task, read_problems
from isomoe.weights import bundled_checkpoint
from servers import Server, running

CLIENTS = 64
LEAST_SAME = 0.99
"""Rounding depends on the batch, and a near tie may fall the other way."""
IDLE_SECONDS = 2.0
"""After the last client. What the cancelled ones asked for would take far longer."""
REQUEST_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One greedy request.

    Attributes:
        chunks: after which the client goes away; None lets it read to the end.
    """

    prompt: str
    max_tokens: int
    ignore_eos: bool = False
    chunks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Got:
    """What an `Ask` brought.

    Attributes:
        end: the finish reason; None if the client went away first.
    """

    ask: Ask
    tokens: list[int]
    end: str | None


def make_prompts(count: int) -> list[str]:
    """Problems after none, two or five solved ones, so that most share a long beginning."""
    task = find_task("arith")
    problems = read_problems(bundled_checkpoint() / "heldout.jsonl")
    return [
        task.prompt(problem, problems[-(0, 2, 5)[index % 3] :] if index % 3 else ())
        for index, problem in enumerate(problems[:count])
    ]


def connect(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS
    )


async def send(client: openai.AsyncOpenAI, ask: Ask) -> Got:
    tokens: list[int] = []
    chunks = 0
    stream = await client.completions.create(
        model="arith-moe",
        prompt=ask.prompt,
        max_tokens=ask.max_tokens,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": ask.ignore_eos},
    )
    async with stream:
        async for chunk in stream:
            (choice,) = chunk.choices
            tokens += (choice.model_extra or {})["token_ids"]
            chunks += 1
            if chunks == ask.chunks:
                return Got(ask=ask, tokens=tokens, end=None)
            if choice.finish_reason is not None:
                return Got(ask=ask, tokens=tokens, end=choice.finish_reason)
    raise AssertionError(f"the stream ended without a finish reason, after {len(tokens)} tokens")


async def load(server: Server, seconds: float, prompts: Sequence[str]) -> list[Got]:
    """Each client sends one request after the other until the time is up."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    got: list[Got] = []

    async def run(client: openai.AsyncOpenAI, number: int) -> None:
        draws = Random(number)
        while loop.time() < deadline:
            prompt = draws.choice(prompts)
            if number % 5 == 0:
                # Without the cancellation this would go on to the end of the context.
                ask = Ask(
                    prompt=prompt, max_tokens=1024, ignore_eos=True, chunks=draws.randint(1, 40)
                )
            else:
                ask = Ask(prompt=prompt, max_tokens=draws.choice((1, 8, 24, 48, 96)))
            got.append(await send(client, ask))

    async with connect(server) as client, asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(run(client, number))
    return got


async def alone(server: Server, asks: Sequence[Ask]) -> list[list[int]]:
    """The tokens of each request when it is the only one, and no prefix is cached."""
    found = []
    async with connect(server) as client:
        for ask in asks:
            flush(server)
            found.append((await send(client, ask)).tokens)
    return found


def is_same(got: Got, reference: Sequence[int]) -> bool:
    if got.end is None:
        common = min(len(got.tokens), len(reference))
        return got.tokens[:common] == reference[:common]
    return got.tokens == reference[: got.ask.max_tokens]


def check(got: Sequence[Got], references: dict[str, list[int]]) -> None:
    different = [one for one in got if not is_same(one, references[one.ask.prompt])]
    share = 1 - len(different) / len(got)
    print(
        f"{len(got)} requests, {sum(len(one.tokens) for one in got)} tokens, "
        f"{Counter(one.end for one in got)}, {share:.2%} as alone"
    )
    assert share >= LEAST_SAME, f"{share:.2%} of {len(got)}: {different[:3]}"


@pytest.mark.parametrize(
    ("seconds", "num_prompts"), [(4, 8), pytest.param(60, 64, marks=pytest.mark.slow)]
)
def test_under_load_no_request_is_lost_no_page_leaks_and_the_answers_stay(
    dp_server: Server, seconds: float, num_prompts: int
) -> None:
    prompts = make_prompts(num_prompts)
    before = flush(dp_server)

    got = asyncio.run(load(dp_server, seconds, prompts))
    wait_idle(dp_server, IDLE_SECONDS)
    assert flush(dp_server) == before
    assert "Traceback" not in "".join(dp_server.log)

    ends = Counter(one.end for one in got)
    assert ends.keys() == {"stop", "length", None}  # None: the client went away
    asks = [Ask(prompt=prompt, max_tokens=96) for prompt in prompts]
    references = asyncio.run(alone(dp_server, asks))
    check(got, dict(zip(prompts, references, strict=True)))


@pytest.mark.slow
def test_requests_that_lose_their_pages_for_a_while_answer_as_if_alone() -> None:
    # Two requests of a group fit as they join, with the growth that is seen to then, but not at
    # their ends, where each holds 13 or 14 pages. In fp32 no near tie falls the other way.
    flags = ("--tp-size", "2", "--attn-dp-size", "2", "--ep-size", "2", "--dtype", "float32")
    prompts = make_prompts(9)[::3]
    asks = [Ask(prompt=prompt, max_tokens=160, ignore_eos=True) for prompt in prompts]
    with running(*flags, "--max-total-tokens", "400") as server:

        async def together() -> list[Got]:
            async with connect(server) as client:
                return await asyncio.gather(*(send(client, ask) for ask in asks))

        got = asyncio.run(together())
        wait_idle(server, IDLE_SECONDS)
        assert info(server)["retracted"] > 0
        assert [one.end for one in got] == ["length"] * len(asks)
        references = asyncio.run(alone(server, asks))
        check(got, dict(zip(prompts, references, strict=True)))
