"""Every error that isomoe raises on purpose.

    IsomoeError
    |- ConfigError       a setting or a combination of settings that cannot work
    |- PlacementError    placements, moves or sums that do not fit (level 1 of the checks)
    |- CollectiveError   ranks that disagree on a collective (order, group, size)
    |- CheckpointError   files or tensors that are missing, truncated or of the wrong shape
    |- RequestError      one request that cannot be served; carries an HTTP status
    `- EngineDeadError   a worker died: the replica is gone, and every open request with it

A message names the setting as typed, the fact with its numbers, and what would work.
"""


class IsomoeError(Exception):
    """Base of all of them: a command prints it as one line and ends non-zero."""


class ConfigError(IsomoeError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class PlacementError(IsomoeError, ValueError):
    """Placements that do not fit; names the block, the axis and the letter."""


class CollectiveError(IsomoeError, RuntimeError):
    """Ranks of one group called different collectives, or one that cannot be formed."""


class CheckpointError(IsomoeError, ValueError):
    """A checkpoint that cannot be read as the model it claims to be."""


class RequestError(IsomoeError, ValueError):
    """One request that cannot be served.

    Attributes:
        status: the HTTP status that says the same.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class EngineDeadError(IsomoeError, RuntimeError):
    """A worker ended before its time; nothing more can be served by this engine."""
