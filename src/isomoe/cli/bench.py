"""`isomoe bench`: measurements. Each is a module of its own, like a command."""

import argparse

from isomoe.cli import bench_comm, bench_kernel, bench_offline, bench_serve

NAME = "bench"
HELP = "Measure the engine, its kernels, or a server."

_MEASUREMENTS = (bench_offline, bench_kernel, bench_comm, bench_serve)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a parser for each measurement."""
    commands = parser.add_subparsers(title="measurements", metavar="WHAT", required=True)
    for module in _MEASUREMENTS:
        one = commands.add_parser(
            module.NAME, help=module.HELP, description=module.HELP, allow_abbrev=False
        )
        module.add_arguments(one)
        one.set_defaults(measure=module.run)


def run(args: argparse.Namespace) -> int:
    """Runs the measurement that was asked for."""
    code: int = args.measure(args)
    return code
