"""Real server processes on loopback."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STOP_SECONDS = 30


@dataclass
class Server:
    """A running `isomoe serve`.

    Attributes:
        log: what it wrote to stderr, growing.
    """

    url: str
    model: str
    process: subprocess.Popen[str]
    engine_pid: int
    worker_pids: list[int]
    log: list[str]

    def stop(self) -> int:
        """Ends it as an operator would; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def running(*flags: str, **environment: str) -> Iterator[Server]:
    """A server on a free port, with these flags of `isomoe serve`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "isomoe.cli.main", "serve", "--port", "0", "--json", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tempfile.gettempdir(),
        # With others on the machine, threads that wait for one another are many times slower.
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    log: list[str] = []
    reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        line = process.stdout.readline()
        assert line, "".join(log) or f"exit code {process.wait(STOP_SECONDS)}"
        found = json.loads(line)
        yield Server(
            url=found["url"],
            model=found["model"],
            process=process,
            engine_pid=found["engine_pid"],
            worker_pids=found["worker_pids"],
            log=log,
        )
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        reader.join(STOP_SECONDS)
        process.stderr.close()
