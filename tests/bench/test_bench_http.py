import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from fake_server import FakeServer

from isomoe.errors import ConfigError
from isomoe.http import HttpClient, Response, ResponseError, ResponseReader, Url

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
RESPONSES = [
    (OK + b"Content-Length: 5\r\n\r\nhello", b"hello", 200, True),
    (OK + b"content-length:0\r\n\r\n", b"", 200, True),
    (CHUNKED + b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\n\r\n", b"hello!", 200, True),
    (CHUNKED + b"a\r\n0123456789\r\n0\r\nTrailer: 1\r\nOther: 2\r\n\r\n", b"0123456789", 200, True),
    (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\n1", b"1", 200, True),
    (b"HTTP/1.1 429 Slow\r\nContent-Length: 2\r\n\r\n{}", b"{}", 429, True),
    (b"HTTP/1.1 204 No Content\r\n\r\n", b"", 204, True),
    (OK + b"Connection: close\r\nContent-Length: 1\r\n\r\n1", b"1", 200, False),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n1", b"1", 200, False),
]


@pytest.mark.parametrize(("whole", "body", "status", "can_reuse"), RESPONSES)
def test_a_response_is_the_same_wherever_it_is_cut(
    whole: bytes, body: bytes, status: int, can_reuse: bool
) -> None:
    for cut in range(1, len(whole)):
        reader = ResponseReader()
        found = reader.feed(whole[:cut])
        assert not reader.is_done
        found += reader.feed(whole[cut:])
        assert (found, reader.status, reader.can_reuse) == (body, status, can_reuse)
        assert reader.is_done
    reader = ResponseReader()
    assert b"".join(reader.feed(whole[i : i + 1]) for i in range(len(whole))) == body
    assert reader.is_done


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    reader = ResponseReader()
    assert reader.feed(OK + b"\r\nhel") + reader.feed(b"lo") == b"hello"
    assert not reader.is_done
    reader.end()
    assert reader.is_done
    assert not reader.can_reuse


@pytest.mark.parametrize(
    "whole", [one[0] for one in RESPONSES if one[0].startswith(OK)], ids=range(5)
)
def test_a_response_that_breaks_off_is_an_error(whole: bytes) -> None:
    for cut in range(len(whole)):
        reader = ResponseReader()
        reader.feed(whole[:cut])
        with pytest.raises(ResponseError, match="closed the connection"):
            reader.end()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP/1.1: 'SSH-2.0-OpenSSH'"),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", "no HTTP/1.1"),
        (b"HTTP/2 200 OK\r\n\r\n", "no HTTP/1.1"),
        (CHUNKED + b"zz\r\n", "chunk size b'zz'"),
        (CHUNKED + b"-1\r\n", "chunk size b'-1'"),
        (CHUNKED + b"\r\n", "chunk size b''"),
        (CHUNKED + b"1\r\nabc", "longer than it says"),
        (OK + b"Content-Length: many\r\n\r\n", "content-length 'many'"),
        (OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", "content-length '9999"),
        (OK + b"Transfer-Encoding: gzip\r\n\r\n", "transfer-encoding 'gzip'"),
        (OK + b"Content-Length: 1\r\n\r\n12", "after the end"),
        (b"x" * (1 << 17), "more than"),
    ],
)
def test_what_is_no_response_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(ResponseError, match=message):
        ResponseReader().feed(data)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:30000", Url(host="127.0.0.1", port=30000)),
        ("http://host/v1/", Url(host="host", port=80)),
        ("https://host/prefix/v1", Url(host="host", port=443, tls=True, path="/prefix")),
        ("http://[::1]:8000", Url(host="::1", port=8000)),
    ],
)
def test_a_url_is_read_with_or_without_v1(text: str, url: Url) -> None:
    assert Url.parse(text) == url
    assert Url.parse(str(url)) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:30000",
        "ftp://host",
        "http://",
        "http://h:99999",
        "http://h/a b",
        "http://a..b",
    ],
)
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be like http://"):
        Url.parse(text)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"error": {"message": "too\\n long", "type": "x"}}', "400 Bad Request: too long"),
        (b'{"message": "vLLM\'s old form"}', "400 Bad Request: vLLM's old form"),
        (b'{"detail": "FastAPI\'s"}', "400 Bad Request: FastAPI's"),
        (b"plain text", "400 Bad Request: plain text"),
        (b"", "400 Bad Request"),
    ],
)
def test_a_refusal_is_said_in_one_line(body: bytes, problem: str) -> None:
    assert Response(status=400, body=body).problem == problem


def test_connections_are_kept_and_replaced_when_the_server_closes_them() -> None:
    async def main(server: FakeServer, pauses: float) -> list[int]:
        http = HttpClient(Url.parse(server.url))
        statuses = []
        for _ in range(4):
            statuses.append((await http.get("/v1/models")).status)
            await asyncio.sleep(pauses)
        http.close()
        return statuses

    with FakeServer() as server:
        assert asyncio.run(main(server, 0.0)) == [200] * 4
        assert server.connections == 1
    for pauses in (0.0, 0.05):  # the end of the connection is or is not yet known
        with FakeServer(answers_per_connection=2) as server:
            assert asyncio.run(main(server, pauses)) == [200] * 4
            assert server.connections == 2


def test_https_checks_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key),
         "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    async def status(server: FakeServer) -> int:
        http = HttpClient(Url.parse(server.url))
        try:
            return (await http.get("/v1/models")).status
        finally:
            http.close()
            await asyncio.sleep(0)

    with FakeServer(tls=tls) as server:
        with pytest.raises(ssl.SSLCertVerificationError):
            asyncio.run(status(server))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert asyncio.run(status(server)) == 200
