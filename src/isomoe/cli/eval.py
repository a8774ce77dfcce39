"""`isomoe eval`: the accuracy of a model on a task."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from isomoe import __version__
from isomoe.cli.options import add_engine_options, engine_config_from
from isomoe.cli.progress import progress_bar
from isomoe.config import EngineConfig
from isomoe.errors import ConfigError
from isomoe.eval import TASKS, Problem, Share, Task, find_task, read_problems

if TYPE_CHECKING:
    from isomoe.engine import LLM
    from isomoe.eval.run import Result

NAME = "eval"
HELP = "Score a model on a task: greedy answers, strict and flexible extraction."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    names = ", ".join(task.name for task in TASKS)
    parser.add_argument("--task", required=True, metavar="NAME", help=names)
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="problems in GSM8K's JSONL format (default for arith: those that ship with the model)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="score the first N problems only")
    parser.add_argument(
        "--num-fewshot",
        type=int,
        metavar="K",
        help="solved problems before each question (default: arith 0, gsm8k 5)",
    )
    parser.add_argument(
        "--fewshot-data",
        metavar="FILE",
        help="where they come from (default: the first K of the data, which are then not scored)",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="of an answer (default: arith 160, gsm8k 256)"
    )
    parser.add_argument(
        "--min-accuracy", type=float, metavar="X", help="exit 1 if the accuracy is below X (0 to 1)"
    )
    parser.add_argument(
        "--inject", metavar="NAME", help="plant a known defect (`isomoe prove --list-mutants`)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    task = find_task(args.task)
    _check(args)
    config = engine_config_from(args)
    from isomoe.weights import resolve

    folder = resolve(args.model_path)
    if args.inject is not None:
        from isomoe.models import read_config
        from isomoe.parity.inject import instrument_of

        planted = instrument_of(args.inject, read_config(folder))
        config = replace(config, instrument=planted)
    problems, fewshot, source = _problems(args, task, folder)

    from isomoe.engine import LLM
    from isomoe.eval.run import evaluate

    with progress_bar("loading") as loading:
        llm = LLM.from_config(config, loading)
    with llm, progress_bar("answering") as answering:
        result = evaluate(llm, task, problems, fewshot, args.max_tokens, answering)
    if args.json:
        print(json.dumps(_document(args, config, llm, task, len(fewshot), source, result)))
    else:
        _print(config, llm, task, len(fewshot), source, result)
    accuracy = result.strict.value
    return 1 if args.min_accuracy is not None and accuracy < args.min_accuracy else 0


def _check(args: argparse.Namespace) -> None:
    for flag, value, least in (
        ("--limit", args.limit, 1),
        ("--num-fewshot", args.num_fewshot, 0),
        ("--max-tokens", args.max_tokens, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{flag} {value}: must be at least {least}")
    if args.min_accuracy is not None and not 0.0 <= args.min_accuracy <= 1.0:
        raise ConfigError(f"--min-accuracy {args.min_accuracy}: must be from 0 to 1")


def _problems(
    args: argparse.Namespace, task: Task, folder: Path
) -> tuple[list[Problem], list[Problem], Path]:
    """Those to score, those to show, and the file of the former."""
    source = Path(args.data) if args.data is not None else task.default_data(folder)
    if source is None:
        raise ConfigError(f"--task {task.name}: --data FILE is missing; it ships with no model")
    problems = read_problems(source)
    shown = task.num_fewshot if args.num_fewshot is None else args.num_fewshot
    if args.fewshot_data is not None:
        solved = read_problems(Path(args.fewshot_data))
        if len(solved) < shown:
            raise ConfigError(
                f"--fewshot-data {args.fewshot_data}: {len(solved)} problems for "
                f"--num-fewshot {shown}"
            )
    else:
        solved, problems = problems, problems[shown:]
        if not problems:
            raise ConfigError(
                f"{source}: {len(solved)} problems, and --num-fewshot {shown} takes the first "
                f"{shown}; nothing is left to score"
            )
    return problems[: args.limit], solved[:shown], source


def _document(
    args: argparse.Namespace,
    config: EngineConfig,
    llm: "LLM",
    task: Task,
    num_fewshot: int,
    source: Path,
    result: "Result",
) -> dict[str, object]:
    import torch

    return {
        "task": task.name,
        **result.strict.to_json(),
        "extraction": "strict",
        "strict": result.strict.to_json(),
        "flexible": result.flexible.to_json(),
        "num_fewshot": num_fewshot,
        "data": args.data or source.name,
        "cut_at_max_tokens": result.cut,
        "model": config.model_path or llm.info.folder.name,
        "layout": str(config.parallelism),
        "inject": args.inject,
        "load_format": str(config.load_format),
        "dtype": llm.info.dtype,
        "device": llm.info.device,
        "seconds": round(result.seconds, 3),
        "output_tokens": result.output_tokens,
        "output_tokens_per_second": round(result.output_tokens / result.seconds, 1),
        "isomoe": __version__,
        "torch": torch.__version__,
    }


def _print(
    config: EngineConfig, llm: "LLM", task: Task, num_fewshot: int, source: Path, result: "Result"
) -> None:
    defect = f" with {config.instrument.rpartition(':')[2]} planted" if config.instrument else ""
    print(
        f"{task.name}, {num_fewshot}-shot, {result.strict.total} problems of {source.name}: "
        f"{config.model_path or llm.info.folder.name} "
        f"({llm.info.dtype}, {llm.info.device}, {config.parallelism}){defect}"
    )
    for rule, share in (("strict", result.strict), ("flexible", result.flexible)):
        print(f"{rule:<9} {_shown(share)}")
    print(
        f"{result.output_tokens} tokens in {result.seconds:.1f} s "
        f"({result.output_tokens / result.seconds:.0f} tokens/s); "
        f"{result.cut} answers cut at the token limit"
    )


def _shown(share: Share) -> str:
    low, high = share.interval
    return f"{share.value:.4f}  {share.right}/{share.total}, 95% interval {low:.4f} to {high:.4f}"
