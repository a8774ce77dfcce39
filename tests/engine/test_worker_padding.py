"""A step with padding rows gives what it gives without."""

from pathlib import Path

from isomoe.config import Device, EngineConfig
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.outputs import TokenLogprob
from isomoe.engine.sampling_params import SamplingParams
from isomoe.engine.step import GroupOutput, GroupStep, Joined, Request, Schedule, StepShape
from isomoe.engine.worker import Worker


def outputs(folder: Path, padding: int) -> list[GroupOutput | None]:
    """A prefill and a decode of two requests, each step with `padding` more rows."""
    config = EngineConfig(model_path=str(folder), device=Device.CPU)
    worker = Worker(config, ModelInfo.of(config))
    worker.allocate_cache(8)
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=0, prompt_logprobs=0)
    requests = [
        Request(request_id=index, prompt_token_ids=prompt, params=params, max_tokens=4)
        for index, prompt in enumerate([(1, 2, 3), (4, 5)])
    ]
    prefill = GroupStep(
        joined=tuple(
            Joined(request=one, output_ids=(), pages=(one.request_id,), computed=0)
            for one in requests
        ),
        schedule=Schedule(
            request_ids=(0, 1), num_tokens=(3, 2), num_logits=(3, 2), samples=(True, True)
        ),
    )
    decode = GroupStep(
        schedule=Schedule(
            request_ids=(1, 0), num_tokens=(1, 1), num_logits=(1, 1), samples=(True, True)
        )
    )
    found = []
    for group in (prefill, decode):
        assert group.schedule is not None
        rows = sum(group.schedule.num_tokens)
        shape = StepShape(
            rows=(rows,),
            padded=(rows + padding,) if padding else None,
            logits_rows=(tuple(range(rows)),),
            regime=0,
        )
        answer = worker.launch(shape, group)
        assert answer is not None
        found.append(answer.wait())
    return found


def test_padding_rows_change_nothing(folder: Path) -> None:
    plain, padded = outputs(folder, 0), outputs(folder, 3)
    for one, other in zip(plain, padded, strict=True):
        assert one is not None
        assert other is not None
        assert one.token_ids == other.token_ids
        assert len(one.token_ids) == len(one.logprobs) == 2
        pairs = [(one.logprobs, other.logprobs)]
        assert one.prompt_logprobs.keys() == other.prompt_logprobs.keys()
        pairs += [
            (one.prompt_logprobs[key], other.prompt_logprobs[key]) for key in one.prompt_logprobs
        ]
        for left, right in pairs:
            for a, b in zip(left, right, strict=True):
                assert isinstance(a, TokenLogprob)
                assert isinstance(b, TokenLogprob)
                assert a.token_id == b.token_id
                assert abs(a.logprob - b.logprob) < 1e-5
