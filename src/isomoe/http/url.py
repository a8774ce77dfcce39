"""Where a server is."""

from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from isomoe.errors import ConfigError

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Url:
    """Where a server is.

    Attributes:
        host: a name or an address.
        port: a number.
        tls: whether the scheme is https.
        path: of the API's root, without `/v1`; empty or `/some/prefix`.
    """

    host: str
    port: int
    tls: bool = False
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The URL that `text` names, with or without `/v1` at its end.

        Raises:
            ConfigError: if it is none.
        """
        try:
            parts = urlsplit(text)
            port = parts.port
            is_url = parts.scheme in _PORTS and parts.hostname and text.isascii()
            (parts.hostname or "").encode("idna")  # as a resolver does; labels may be too long
        except ValueError:
            is_url = False
        if not is_url or text.split() != [text]:
            raise ConfigError(f"--url {text}: must be like http://127.0.0.1:30000")
        assert parts.hostname is not None
        return cls(
            host=parts.hostname,
            port=port or _PORTS[parts.scheme],
            tls=parts.scheme == "https",
            path=parts.path.rstrip("/").removesuffix("/v1"),
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{self.path}"
