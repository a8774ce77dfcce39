"""The front end's side of the engine process: its start, the two sockets to it, and its end."""

import os
import shutil
import subprocess
import tempfile
import weakref

import msgspec
import zmq

from isomoe import errors
from isomoe.child import start_child
from isomoe.config import EngineConfig
from isomoe.engine.executor import Progress
from isomoe.errors import EngineDeadError, IsomoeError
from isomoe.server.messages import Failed, FromEngine, Launch, LoadProgress, Ready, ToEngine

LOOK_MS = 200
"""How often a silent engine process is looked after."""
_STOP_SECONDS = 5.0


class EngineLink:
    """The process, and the two sockets to it, in a folder that only this user can enter."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="isomoe-")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._out = self._context.socket(zmq.PUSH)
        self._in = self._context.socket(zmq.PULL)
        for socket, name in ((self._out, "requests"), (self._in, "answers")):
            socket.set_hwm(0)
            # Who connects can queue messages at once, and still when the other side is gone; who
            # binds would wait for somebody to send to.
            socket.connect(f"ipc://{self._folder}/{name}")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        lifeline, self._lifeline = os.pipe()
        try:
            call = f"isomoe.server.engine_process.main({self._folder!r}, {lifeline})"
            self._process = start_child(call, (lifeline,))
        finally:
            os.close(lifeline)
        self._end = weakref.finalize(
            self, _end, self._process, self._context, self._lifeline, self._folder, os.getpid()
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def launch(self, config: EngineConfig, progress: Progress | None) -> Ready:
        """Waits until the engine is ready.

        Raises:
            IsomoeError: what the engine raised instead.
        """
        self.send(Launch(config))
        while True:
            match self.receive(LOOK_MS):
                case LoadProgress(done=done, total=total):
                    if progress is not None:
                        progress(done, total)
                case Ready() as ready:
                    # The sockets are connected and need no names any more.
                    shutil.rmtree(self._folder, ignore_errors=True)
                    return ready
                case message:
                    assert message is None, f"the engine sent {message}"

    def send(self, message: Launch | ToEngine) -> None:
        """Queues a message; never waits."""
        self._out.send(self._encoder.encode(message))

    def receive(self, wait_ms: int) -> FromEngine | None:
        """The next message; None if none came in time.

        Raises:
            IsomoeError: that with which the engine ended.
            EngineDeadError: if it ended without a word.
        """
        ended = self._process.poll()
        if self._in.poll(wait_ms if ended is None else 0):
            message = self._decoder.decode(self._in.recv())
            if isinstance(message, Failed):
                raise _raised(message)
            return message
        if ended is not None:
            how = f"was killed by signal {-ended}" if ended < 0 else f"ended with exit code {ended}"
            raise EngineDeadError(f"the engine process ({self._process.pid}) {how}")
        return None

    def kill(self) -> None:
        """Ends the process at once, for one that hangs."""
        self._process.kill()

    def shutdown(self) -> None:
        """Ends the process and removes the folder. May be called twice."""
        self._end()


def _end(
    process: "subprocess.Popen[bytes]",
    context: "zmq.Context[zmq.Socket[bytes]]",
    lifeline: int,
    folder: str,
    owner: int,
) -> None:
    if os.getpid() != owner:  # a fork of the parent has no say
        return
    os.close(lifeline)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    context.destroy(linger=0)
    shutil.rmtree(folder, ignore_errors=True)


def _raised(failed: Failed) -> IsomoeError:
    kind = getattr(errors, failed.kind, EngineDeadError) if failed.kind else EngineDeadError
    error: IsomoeError = kind(failed.message)
    return error
