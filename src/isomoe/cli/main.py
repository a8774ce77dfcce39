"""The `isomoe` command. Each subcommand is a module, imported when it is asked for."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

from isomoe import __version__
from isomoe.config import OPENMP_DEFAULTS
from isomoe.errors import IsomoeError

COMMANDS = {
    "serve": "serve a model over HTTP, as OpenAI's, SGLang's and vLLM's clients expect",
    "generate": "generate text from prompts",
    "models": "list the model families, what was measured and what is proven of them",
    "plan": "print which collectives a model runs under a layout, and what they cost",
    "prove": "prove that every plan sums every contribution exactly once, without weights",
    "parity": "compare tokens and log-probabilities of two layouts, engines or servers",
    "eval": "score a model on a task",
    "tune": "find the fastest launch configurations of the GPU kernels on this card",
    "bench": "measure the engine, its kernels, or a server",
}
"""Name -> one line of help. The module of a command is `isomoe.cli.<name>`; it has `NAME`, `HELP`,
`add_arguments(parser)` and `run(args) -> int`."""

EXIT_WRONG_USE = 2
EXIT_DEFECT = 70
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of the command."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_WRONG_USE, f"isomoe: error: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        0 if it holds, 1 if it does not, 2 for wrong use, 70 for a defect of ours, 130 for Ctrl-C,
        143 for SIGTERM. A server ends with 0 after either of these.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for name, value in OPENMP_DEFAULTS.items():
        os.environ.setdefault(name, value)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except _Terminated:
        return EXIT_TERMINATED
    except IsomoeError as error:
        print(f"isomoe: error: {error}", file=sys.stderr)
        return EXIT_WRONG_USE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`). Keep the interpreter from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_WRONG_USE
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        print(
            f"isomoe: defect of ours: {type(error).__name__}: {error} "
            "(python -X dev -m isomoe.cli.main shows where)",
            file=sys.stderr,
        )
        return EXIT_DEFECT
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: as with Ctrl-C, what was started is ended."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _run(words: list[str]) -> int:
    if words and words[0] in _available():
        name = words[0]
        module = import_module(f"isomoe.cli.{name}")
        parser = _Parser(prog=f"isomoe {name}", description=module.HELP, allow_abbrev=False)
        module.add_arguments(parser)
        code: int = module.run(parser.parse_args(words[1:]))
        return code
    parser = _Parser(prog="isomoe", description="Mixture-of-Experts serving.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"isomoe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in _available().items():
        commands.add_parser(name, help=text)
    parser.parse_args(words)
    return EXIT_WRONG_USE


def _available() -> dict[str, str]:
    return {
        name: text for name, text in COMMANDS.items() if find_spec(f"isomoe.cli.{name}") is not None
    }


if __name__ == "__main__":
    sys.exit(main())
