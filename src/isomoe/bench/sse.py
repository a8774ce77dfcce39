"""Server-sent events, parsed as they come."""


class SseParser:
    """The data of each event of a stream whose pieces may be cut anywhere.

    Lines may end in LF, CRLF or CR; comments and fields other than `data` are dropped. Source:
    the WHATWG HTML standard, section "Server-sent events".
    """

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Takes the next bytes; returns the data of the events that they complete."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        return [event for block in blocks if (event := _data(block)) is not None]


def _data(block: bytes) -> bytes | None:
    """The `data` lines of an event, joined; None if there is none."""
    lines = [
        line.removeprefix(b"data").removeprefix(b":").removeprefix(b" ")
        for line in block.split(b"\n")
        if line.startswith(b"data:") or line == b"data"
    ]
    return b"\n".join(lines) if lines else None
