"""`isomoe serve` in a process of its own, for as long as it is measured."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from isomoe.errors import EngineDeadError
from isomoe.http import Url

_STOP_SECONDS = 60.0


@contextmanager
def launched_server(words: Sequence[str]) -> Iterator[Url]:
    """A server of ours on a free port of this host: ready inside `with`, gone after it.

    Args:
        words: flags of `isomoe serve`, besides host and port.

    Raises:
        EngineDeadError: if it does not come up; says the last line that it printed.
    """
    command = [sys.executable, "-m", "isomoe.cli.main", "serve", "--port", "0", "--json", *words]
    open_to_us = {name: value for name, value in os.environ.items() if name != "ISOMOE_API_KEY"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=open_to_us,
            process_group=0,  # Ctrl-C is for this process, which ends the server
        )
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            if not ready:
                code = process.wait(_STOP_SECONDS)
                raise EngineDeadError(f"isomoe serve ended with {code}: {_last_line(log)}")
            yield Url.parse(json.loads(ready)["url"])
        finally:
            _stop(process)


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM; SIGKILL if that does not help."""
    with process:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
