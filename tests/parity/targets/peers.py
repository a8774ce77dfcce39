"""Servers that we did not write, as processes of their own on loopback."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

START_SECONDS = 180
STOP_SECONDS = 30

_LLAMA_CPP = """
import sys, threading
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port = int(sys.argv[2])
params.n_ctx, params.n_parallel, params.warmup = 4096, 4, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# Its flash attention is not exact: up to 0.001 nats off, and 0.05 for unlikely candidates.
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
threading.Event().wait()
"""


@contextmanager
def llama_cpp(file: Path) -> Iterator[str]:
    """llama.cpp's server on a GGUF file, all in fp32; its URL."""
    port = _free_port()
    with _running([sys.executable, "-c", _LLAMA_CPP, str(file), str(port)], port, "/health"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def transformers_serve(folder: Path) -> Iterator[str]:
    """`transformers serve` on a checkpoint, in fp32 on the CPU; its URL."""
    port = _free_port()
    program = Path(sys.executable).parent / "transformers"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with _running([str(program), "serve", str(folder), *flags], port, "/health"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _running(command: list[str], port: int, page: str) -> Iterator[None]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=tempfile.gettempdir(),
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        try:
            until = time.monotonic() + START_SECONDS
            while not _answers(f"http://127.0.0.1:{port}{page}"):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise AssertionError(log.read().decode(errors="replace"))
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
