"""The README's serving section does what it says: every block of it runs, in order."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers import Server, running

README = (Path(__file__).parent.parent / "README.md").read_text()
SERVING = README.split("\n## Serving\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", SERVING, re.DOTALL)
ADDRESS = "http://127.0.0.1:30000"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The first block, on a free port."""
    program, command, *flags = shlex.split(BLOCKS[0][1])
    assert (program, command) == ("isomoe", "serve")
    with running(*flags) as one:
        yield one


def test_the_section_has_the_blocks_that_a_newcomer_needs() -> None:
    programs = [block.split()[0] for kind, block in BLOCKS if kind == "bash"]
    assert programs == ["isomoe", "curl", "curl", "isomoe"]
    assert sum(kind == "python" for kind, _ in BLOCKS) == 1


@pytest.mark.parametrize(("kind", "block"), BLOCKS[1:])
def test_a_block_runs_as_written(server: Server, kind: str, block: str) -> None:
    block = block.replace(ADDRESS, server.url)
    if block.startswith("isomoe bench"):
        block = f"{block.rstrip()} --url {server.url}"  # its default is the default address
    words = ["bash", "-ec", block] if kind == "bash" else [sys.executable, "-c", block]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout
