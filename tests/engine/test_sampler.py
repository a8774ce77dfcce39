"""The sampler on one rank, step by step, against the definition of each parameter.

Random logits stand for the model. `expected` recomputes every row from all tokens so far.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from isomoe.comm import LocalComm
from isomoe.engine import SamplingParams
from isomoe.engine.grammar import GrammarFactory
from isomoe.engine.sampler import Draw, Sampler
from isomoe.engine.step import GroupOutput, Request
from isomoe.layout import Mesh, Parallelism, Seat
from isomoe.weights import bundled_checkpoint

VOCAB = 97
END = frozenset({0, 2})


def sampler(folder: Path | None = None, vocab_size: int = VOCAB) -> Sampler:
    comm = LocalComm(Seat(Mesh.of(Parallelism()), 0))
    return Sampler(comm, True, GrammarFactory(folder or Path("nowhere"), vocab_size, END))


def request(
    number: int, params: SamplingParams, prompt: Sequence[int] = (1, 5, 5, 9), seed: int = 0
) -> Request:
    return Request(
        request_id=number,
        prompt_token_ids=tuple(prompt),
        params=params,
        max_tokens=params.max_tokens,
        stop_ids=END,
        seed=seed,
    )


def answered(one: Sampler, logits: Tensor, draws: Sequence[Draw]) -> GroupOutput:
    answer = one.launch(logits, draws).answer
    assert answer is not None
    return answer.wait()


class Run:
    """Requests that all draw in every step."""

    def __init__(self, *params: SamplingParams, sampler: Sampler) -> None:
        self.sampler = sampler
        self.requests = [request(i, one, seed=i) for i, one in enumerate(params)]
        self.tokens = [list(one.prompt_token_ids) for one in self.requests]

    def step(self, logits: Tensor) -> GroupOutput:
        draws = [
            Draw(one, tokens, len(tokens) - 1, 1, True)
            for one, tokens in zip(self.requests, self.tokens, strict=True)
        ]
        output = answered(self.sampler, logits, draws)
        assert output is not None
        assert output.token_ids == [tokens[-1] for tokens in self.tokens]
        return output

    def outputs(self) -> list[list[int]]:
        return [
            tokens[len(one.prompt_token_ids) :]
            for one, tokens in zip(self.requests, self.tokens, strict=True)
        ]


def greedy(**changes: object) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 100} | changes))  # type: ignore[arg-type]


ASKING = [
    greedy(presence_penalty=1.5),
    greedy(frequency_penalty=0.4),
    greedy(repetition_penalty=1.3),
    greedy(presence_penalty=-0.5, frequency_penalty=-0.2, repetition_penalty=0.8),
    greedy(logit_bias=((7, 1.0), (8, -1.0))),
    greedy(min_tokens=10),
    greedy(logit_bias=((0, 100.0),), min_tokens=3, presence_penalty=2.0),
]


def expected(logits: Tensor, tokens: list[int], prompt: int, params: SamplingParams) -> Tensor:
    """One row [V] by the definitions, with transformers' repetition penalty."""
    row = logits.clone()
    output = tokens[prompt:]
    for token, bias in params.logit_bias:
        row[token] += bias
    penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    row = penalty(torch.tensor([tokens]), row.unsqueeze(0))[0]
    for token in set(output):
        row[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    if len(output) < params.min_tokens:
        row[list(END)] = -torch.inf
    return row


def test_greedy_tokens_are_those_of_the_adjusted_logits() -> None:
    torch.manual_seed(0)
    run = Run(*ASKING, greedy(), sampler=sampler())
    changed = 0
    for _ in range(40):
        logits = torch.randn(len(run.requests), VOCAB)
        wanted = [
            expected(logits[i], run.tokens[i], 4, one.params).argmax().item()
            for i, one in enumerate(run.requests)
        ]
        assert run.step(logits).token_ids == wanted
        changed += sum(token != row for token, row in zip(wanted, logits.argmax(1), strict=True))
    assert changed > 40  # the parameters did something


def test_reported_logprobs_are_those_of_the_raw_logits() -> None:
    torch.manual_seed(1)
    params = greedy(logit_bias=((50, 100.0),), repetition_penalty=2.0, logprobs=VOCAB)
    run = Run(params, sampler=sampler())
    for _ in range(3):
        logits = torch.randn(1, VOCAB)
        raw = torch.log_softmax(logits[0], dim=-1)
        found = run.step(logits).logprobs[0]
        assert found is not None
        assert found.token_id == 50
        assert found.logprob == pytest.approx(float(raw[50]), abs=1e-5)
        assert [token for token, _ in found.top] == raw.argsort(descending=True).tolist()


def test_a_neighbour_that_asks_changes_nothing_for_the_others() -> None:
    plain = [greedy(), SamplingParams(max_tokens=9), SamplingParams(max_tokens=9, top_k=3)]
    torch.manual_seed(2)
    steps = [torch.randn(5, VOCAB) for _ in range(10)]
    alone = Run(*plain, sampler=sampler())
    mixed = Run(*plain, ASKING[0], ASKING[-1], sampler=sampler())
    for logits in steps:
        mixed.step(logits)
        alone.step(logits[:3])
    assert mixed.outputs()[:3] == alone.outputs()


def test_a_request_that_comes_back_goes_on_as_if_it_had_stayed() -> None:
    grammar = greedy(regex="[a-z]{3,40}", max_tokens=100)
    params = [*ASKING, grammar, SamplingParams(temperature=1.0, presence_penalty=2.0)]
    torch.manual_seed(3)
    steps = [torch.randn(len(params), 640) for _ in range(12)]
    folder = bundled_checkpoint()
    stayed = Run(*params, sampler=sampler(folder, 640))
    left = Run(*params, sampler=sampler(folder, 640))
    for number, logits in enumerate(steps):
        stayed.step(logits)
        left.step(logits)
        if number in (0, 4):
            for one in left.requests:
                left.sampler.forget(one.request_id)
        if number == 7:
            left.sampler = sampler(folder, 640)
    assert left.outputs() == stayed.outputs()


def test_minimum_tokens_are_no_trap_if_every_token_would_end_the_output() -> None:
    ends = replace(request(0, greedy(min_tokens=2)), stop_ids=frozenset(range(VOCAB)))
    tokens = list(ends.prompt_token_ids)
    one = sampler()
    for _ in range(3):
        answered(one, torch.randn(1, VOCAB), [Draw(ends, tokens, len(tokens) - 1, 1, True)])
    assert all(0 <= token < VOCAB for token in tokens)


def test_a_model_without_end_tokens_may_be_asked_for_minimum_tokens() -> None:
    torch.manual_seed(6)
    endless = replace(request(0, greedy(min_tokens=2)), stop_ids=frozenset())
    tokens = list(endless.prompt_token_ids)
    logits = torch.randn(1, VOCAB)
    answered(sampler(), logits, [Draw(endless, tokens, len(tokens) - 1, 1, True)])
    assert tokens[-1] == logits.argmax()


def test_absurd_parameters_draw_a_token_of_the_vocabulary() -> None:
    params = [
        SamplingParams(temperature=1e6),
        SamplingParams(temperature=1e-300),
        SamplingParams(temperature=1e-5, repetition_penalty=1e-300),
        SamplingParams(temperature=1e-5, repetition_penalty=1e300),
        SamplingParams(temperature=1e-5, logit_bias=tuple((i, -100.0) for i in range(VOCAB))),
    ]
    run = Run(*params, sampler=sampler())
    torch.manual_seed(4)
    for _ in range(20):
        run.step(20 * torch.randn(len(params), VOCAB))
    assert all(0 <= token < VOCAB for tokens in run.outputs() for token in tokens)


def test_prompt_logprobs_are_those_of_the_tokens_after_the_scored_rows() -> None:
    prompt = (3, 1, 4, 1, 5, 9)
    asks = SamplingParams(prompt_logprobs=0, max_tokens=9)
    torch.manual_seed(5)
    logits = torch.randn(7, VOCAB)
    raw = torch.log_softmax(logits, dim=-1)
    tokens = [list(prompt) for _ in range(3)]
    draws = [
        Draw(request(0, asks, prompt), tokens[0], 2, 3, False),  # of the middle of the prompt
        Draw(request(1, asks, prompt), tokens[1], 3, 3, True),  # of its end
        Draw(request(2, asks, prompt), tokens[2], 5, 1, True),  # of its last row alone
    ]
    output = answered(sampler(), logits, draws)
    assert output is not None
    assert set(output.prompt_logprobs) == {0, 1}
    for number, wanted in ((0, [(0, 1), (1, 5), (2, 9)]), (1, [(3, 5), (4, 9)])):
        found = output.prompt_logprobs[number]
        assert [one.token_id for one in found] == [token for _, token in wanted]
        for one, (row, token) in zip(found, wanted, strict=True):
            assert one.logprob == pytest.approx(float(raw[row, token]), abs=1e-5)
    assert len(output.token_ids) == 2
