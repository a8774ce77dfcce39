"""When a target counts as different: settings of the verdict, from a file or the defaults."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from isomoe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """When a target counts as different.

    Attributes:
        false_alarm: how often a target that is the same model may be told apart, at most.
        margin: how many times the noise floor a target's deltas may be, for another layout may
            round more often. None is 2, or less where a known-good target was measured.
        mean: of |delta logprob|, in nats. Where this or `max` is pinned, they decide and the
            noise floor does not.
        max: of any one |delta logprob|, in nats.

    Raises:
        ConfigError: if a value cannot be.
    """

    false_alarm: float = 1e-4
    margin: float | None = None
    mean: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.false_alarm < 1:
            raise ConfigError(f"false_alarm {self.false_alarm}: must be between 0 and 1")
        if self.margin is not None and not 1 <= self.margin < float("inf"):
            raise ConfigError(f"margin {self.margin}: must be at least 1, and finite")
        for name, value in (("mean", self.mean), ("max", self.max)):
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{name} {value}: must be at least 0 nats, and finite")

    @property
    def are_pinned(self) -> bool:
        """Whether limits in nats decide."""
        return self.mean is not None or self.max is not None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Those in a JSON file, such as {"mean": 0.04, "max": 1.0}.

        Raises:
            ConfigError: if it is not readable, or has a key or a value that cannot be.
        """
        where = f"--thresholds {path}"
        try:
            document: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: not readable as JSON ({error})") from None
        known = [field.name for field in fields(cls)]
        if not isinstance(document, dict):
            raise ConfigError(f"{where}: must be an object with any of {', '.join(known)}")
        for name, value in document.items():
            if name not in known:
                raise ConfigError(f"{where}: unknown {name!r}; known are {', '.join(known)}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{where}: {name} {value!r}: must be a number")
        try:
            return cls(**document)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
