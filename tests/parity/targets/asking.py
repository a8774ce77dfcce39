"""What the tests of servers have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from isomoe.config import Device, DType, EngineConfig
from isomoe.engine.model_info import ModelInfo
from isomoe.parity.run import TOGETHER, Composition, Prompt, Text
from isomoe.parity.targets.base import Progress, Target
from isomoe.parity.targets.http_client import HttpSettings
from isomoe.parity.targets.http_target import HttpTarget
from isomoe.parity.targets.parse import TargetSettings, target_of
from isomoe.parity.targets.saved import SavedRun

FP32 = EngineConfig(dtype=DType.FLOAT32, device=Device.CPU)
PROMPTS = (Prompt((5, 6, 7), "abc"), Prompt((9, 40), "de"), Prompt((100, 200, 17, 3), "fghi"))


@contextmanager
def no_stage(_: str) -> Iterator[Progress | None]:
    yield None


def server(url: str, **settings: Any) -> HttpTarget:
    """The server there, with little patience."""
    return HttpTarget(url, HttpSettings(**{"timeout_seconds": 5.0, **settings}), no_stage)


def target(text: str, **settings: Any) -> Target:
    """As the command line has it, in fp32 on the CPU."""
    found = target_of(
        text,
        TargetSettings(
            engine=FP32,
            info=lambda: ModelInfo.of(FP32),
            stage=no_stage,
            http=HttpSettings(**settings),
        ),
    )
    assert not isinstance(found, SavedRun)
    return found


def decode(
    from_: Target,
    prompts: tuple[Prompt, ...] = PROMPTS,
    *,
    max_tokens: int = 4,
    top: int = 2,
    composition: Composition = TOGETHER,
) -> list[Text]:
    return from_.generate(
        prompts, max_tokens=max_tokens, ignore_eos=True, top=top, composition=composition
    )


def score(
    with_: Target,
    outputs: list[Text],
    prompts: tuple[Prompt, ...] = PROMPTS,
    *,
    top: int = 2,
    composition: Composition = TOGETHER,
) -> list[Text]:
    return with_.score(prompts, outputs, top=top, composition=composition)
