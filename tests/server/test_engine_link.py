"""The link to an engine process that does not do as it should."""

import subprocess
import sys

import pytest

from isomoe.config import EngineConfig
from isomoe.errors import EngineDeadError
from isomoe.server import engine_link
from isomoe.server.engine_link import EngineLink
from isomoe.server.messages import FlushCache


def test_a_process_that_ends_before_it_connects_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ends_at_once(call: str, fds: object) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(engine_link, "start_child", ends_at_once)
    link = EngineLink()
    try:
        with pytest.raises(EngineDeadError, match="ended with exit code 3"):
            link.launch(EngineConfig(), None)
        link.send(FlushCache())  # to nobody, and without waiting
    finally:
        link.shutdown()
