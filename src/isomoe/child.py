"""Processes of our own: how they start, and how they end with their parent."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from isomoe.config import OPENMP_DEFAULTS


def start_child(
    call: str, fds: Sequence[int], environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Runs one call of isomoe in a fresh interpreter, which runs no part of the user's program.

    Its stdout goes to stderr: stdout is for results, which are the parent's. Ctrl-C does not reach
    it: that is for the parent, which ends its children.

    Args:
        call: such as `package.module.function(1, 2)`.
        fds: file descriptors that it inherits.
        environment: variables beside the parent's.
    """
    module = call.split("(")[0].rpartition(".")[0]
    # The paths go along, so that an instrument is found wherever this process found it.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"import {module}; {call}"],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=fds,
        env={**OPENMP_DEFAULTS, **os.environ, "PYTHONPATH": path, **(environment or {})},
        process_group=0,
    )


def die_with_parent(lifeline_fd: int) -> None:
    """Ends this process when the parent ends, also while a collective blocks.

    Args:
        lifeline_fd: a pipe that nobody writes to; its end is the end of the parent.
    """

    def wait() -> None:
        os.read(lifeline_fd, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
