"""Makes a target of what the user typed."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from isomoe.config import EngineConfig
from isomoe.errors import ConfigError
from isomoe.parity.targets.base import Stage, Target
from isomoe.parity.targets.http_client import HttpSettings
from isomoe.parity.targets.http_target import HttpTarget
from isomoe.parity.targets.saved import SavedRun
from isomoe.parity.targets.transformers_target import TransformersTarget

if TYPE_CHECKING:
    from isomoe.engine.model_info import ModelInfo

_URL = re.compile(r"https?://", re.IGNORECASE)
_LAYOUT = re.compile(r"\s*[a-z]+\d*\s*(,\s*[a-z0-9]*\s*)*(\+.*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings:
    """What targets need beside their names.

    Attributes:
        engine: of layouts; its dtype and device are those of transformers too.
        info: reads the checkpoint of layouts; called only if one is given.
        stage: shows progress.
        http: how servers are spoken to.
    """

    engine: EngineConfig
    info: Callable[[], "ModelInfo"]
    stage: Stage
    http: HttpSettings = field(default_factory=HttpSettings)


def target_of(text: str, settings: TargetSettings) -> Target | SavedRun:
    """The target that `text` names: a URL, `hf:PATH`, `file:RUN.json`, or a layout.

    Raises:
        ConfigError: if it names none, or one that cannot be.
    """
    kind, _, rest = text.partition(":")
    if _URL.match(text):
        return HttpTarget(text, settings.http, settings.stage)
    if kind in ("hf", "file"):
        if not rest:
            raise ConfigError(f"target {text!r}: a path is missing after the ':'")
        if kind == "file":
            return SavedRun.load(text, Path(rest))
        engine = settings.engine
        return TransformersTarget(
            text, rest, dtype=engine.dtype, device=engine.device, stage=settings.stage
        )
    if is_layout(text):
        # Brings torch, which nobody needs who compares servers.
        from isomoe.parity.targets.engine import EngineTarget

        return EngineTarget(text, settings.engine, settings.info(), settings.stage)
    raise ConfigError(
        f"target {shown(text)!r}: is none; http://127.0.0.1:30000 would be a server, hf:PATH a "
        "checkpoint in transformers, file:RUN.json a saved run, tp2,dp2 a layout of this engine"
    )


def shown(text: str) -> str:
    """What the user typed, less what stands before an @: it may be a password."""
    return re.sub(r".*@", "***@", text)


def is_layout(text: str) -> bool:
    """Whether `text` reads as a layout of this engine."""
    return bool(_LAYOUT.fullmatch(text)) and not Path(text).exists()
