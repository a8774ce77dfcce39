import pytest
from hypothesis import given
from hypothesis import strategies as st

from isomoe.bench.sse import SseParser

STREAMS = [
    (b"data: one\n\ndata: two\n\n", [b"one", b"two"]),
    (b"data: one\r\n\r\ndata: two\r\n\r\n", [b"one", b"two"]),
    (b"data: one\r\rdata: two\r\r", [b"one", b"two"]),
    (b"data: one\r\n\ndata: two\n\r\n", [b"one", b"two"]),
    (b"data:one\n\ndata:  two\n\n", [b"one", b" two"]),
    (b"data: a\ndata: b\n\n", [b"a\nb"]),
    (b"data\n\ndata:\n\n", [b"", b""]),
    (b": ping\n\n\n\nevent: x\nid: 1\ndata: y\nretry: 3\n\n: end\n\n", [b"y"]),
    (b"database: no\n\n", []),
    ("data: ä€\n\n".encode(), ["ä€".encode()]),
    (b"data: complete\n\ndata: not complete\n", [b"complete"]),
    (b"", []),
]


def by_lines(stream: bytes) -> list[bytes]:
    """The standard's algorithm, a line at a time, on the whole stream."""
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    events, data = [], []
    for line in lines:
        if not line:
            if data:
                events.append(b"\n".join(data))
            data = []
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
    return events


def parse(*pieces: bytes) -> list[bytes]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


@pytest.mark.parametrize(("stream", "events"), STREAMS)
def test_events_are_the_same_wherever_the_stream_is_cut(stream: bytes, events: list[bytes]) -> None:
    assert by_lines(stream) == events
    for first in range(len(stream) + 1):
        for second in range(first, len(stream) + 1):
            pieces = stream[:first], stream[first:second], stream[second:]
            assert parse(*pieces) == events, pieces
    assert parse(*(stream[i : i + 1] for i in range(len(stream)))) == events


@given(st.lists(st.sampled_from([b"\r", b"\n", b"data", b":", b" ", b"x", b"", b"data: y\n\n"])))
def test_any_pieces_parse_as_the_whole_does_a_line_at_a_time(pieces: list[bytes]) -> None:
    # A CR at the very end may be half a CRLF; the standard's parser waits as well.
    whole = b"".join(pieces) + b"\n"
    assert parse(*pieces, b"\n") == by_lines(whole)


def test_an_event_is_there_as_soon_as_its_blank_line_is() -> None:
    parser = SseParser()
    assert parser.feed(b"data: x\r") == []
    assert parser.feed(b"\n") == []
    assert parser.feed(b"\r") == [b"x"]
    assert parser.feed(b"\ndata: y\n\n") == [b"y"]
