"""The life of a server: the socket, the event loop, signals, and the end."""

import asyncio
import contextlib
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
import uvloop

from isomoe.errors import ConfigError
from isomoe.server.app import create_app
from isomoe.server.async_engine import AsyncEngine
from isomoe.server.config import ServerConfig

_LAST_ANSWERS_SECONDS = 2.0
"""How long a server that cannot go on still answers, so that clients hear of it."""
_FORCED_SECONDS = 0.5
"""How long the answers to open requests may take after a second signal."""
_KEEP_ALIVE_SECONDS = 60
_TOO_LATE = "the server was told to stop, and the time to finish is over"

_log = logging.getLogger(__name__)


def bind(config: ServerConfig) -> socket.socket:
    """The socket to listen on, bound before anything is loaded.

    Raises:
        ConfigError: if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"--host {config.host} --port {config.port}: {error.strerror}; "
            "--port 0 takes a free port"
        ) from None
    return listener


def serve(engine: AsyncEngine, listener: socket.socket, ready: Callable[[], None]) -> int:
    """Serves until a signal says stop, or the engine is gone.

    Args:
        ready: called when connections are accepted.

    SIGTERM and SIGINT stop accepting, and give open requests `drain_timeout_seconds`. A second
    one ends at once.

    Returns:
        The process's exit code: 0 after a signal, 1 if the engine died.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(engine, listener, ready))


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals, which ends with the signal's exit code."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(engine: AsyncEngine, listener: socket.socket, ready: Callable[[], None]) -> int:
    engine.attach()
    await engine.warm_up()
    config = engine.config
    server = _Server(
        uvicorn.Config(
            create_app(engine),
            lifespan="off",
            ws="none",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(
                config.drain_timeout_seconds + _LAST_ANSWERS_SECONDS
            ),
        ),
        ready,
    )
    loop = asyncio.get_running_loop()
    stopped = False

    def stop(name: str) -> None:
        nonlocal stopped
        if stopped:
            engine.end_all(_TOO_LATE)
            loop.call_later(_FORCED_SECONDS, setattr, server, "force_exit", True)
        else:
            _log.info("%s: draining, %d requests are open", name, engine.num_open)
            loop.call_later(config.drain_timeout_seconds, engine.end_all, _TOO_LATE)
        stopped = server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    dying = asyncio.create_task(engine.died.wait())
    await asyncio.wait({serving, dying}, return_when=asyncio.FIRST_COMPLETED)
    if engine.dead is not None:
        _log.error("the engine is gone: %s", engine.dead)
        await asyncio.wait({serving}, timeout=_LAST_ANSWERS_SECONDS)
        server.should_exit = server.force_exit = True
    dying.cancel()
    await serving
    return 0 if engine.dead is None else 1
