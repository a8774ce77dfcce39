"""The settings of one server."""

from dataclasses import dataclass, field
from enum import StrEnum

from isomoe.config import EngineConfig
from isomoe.errors import ConfigError

_HIGHEST_PORT = 65535


class SamplingDefaults(StrEnum):
    """The checkpoint's generation_config.json, or OpenAI's."""

    MODEL = "model"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The settings of one server, beside those of its engine.

    Attributes:
        engine: what is served.
        host: the address to listen on.
        port: 0 takes a free one.
        api_key: what clients must bring as a bearer token; None lets everyone in.
        served_model_name: what clients call the model; None is its path as given.
        chat_template: a file with a Jinja template that replaces the tokenizer's.
        sampling_defaults: where the values come from that a request leaves open.
        max_queued_requests: requests that may wait beside those that run; more get 429.
        max_request_bytes: of a request's body; more gets 413.
        request_timeout_seconds: from a request's arrival to its end; None is without limit.
        drain_timeout_seconds: how long open requests may go on once the server is told to stop.
        log_requests: log bodies and outputs too.

    Raises:
        ConfigError: if a value is out of range.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = field(default=None, repr=False)
    served_model_name: str | None = None
    chat_template: str | None = None
    sampling_defaults: SamplingDefaults = SamplingDefaults.MODEL
    max_queued_requests: int = 1024
    max_request_bytes: int = 16 << 20
    request_timeout_seconds: float | None = None
    drain_timeout_seconds: float = 30.0
    log_requests: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= _HIGHEST_PORT:
            raise ConfigError(f"--port {self.port}: must be from 0 to {_HIGHEST_PORT}")
        if (self.api_key is not None and not self.api_key.isprintable()) or self.api_key == "":
            raise ConfigError("--api-key: must be printable text that is not empty")
        for flag, value, least in (
            ("--max-queued-requests", self.max_queued_requests, 0),
            ("--max-request-bytes", self.max_request_bytes, 1),
            ("--drain-timeout-seconds", self.drain_timeout_seconds, 0),
        ):
            if not least <= value < float("inf"):
                raise ConfigError(f"{flag} {value}: must be at least {least} and finite")
        timeout = self.request_timeout_seconds
        if timeout is not None and not 0 < timeout < float("inf"):
            raise ConfigError(f"--request-timeout-seconds {timeout}: must be above 0 and finite")
