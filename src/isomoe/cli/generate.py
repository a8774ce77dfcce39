"""`isomoe generate`: text from prompts, with the offline engine."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from isomoe.cli.options import add_engine_options, engine_config_from
from isomoe.cli.progress import progress_bar
from isomoe.errors import RequestError
from isomoe.files import make_folder, write_atomically

if TYPE_CHECKING:
    from isomoe.engine import LLM, RequestOutput

NAME = "generate"
HELP = "Generate text from prompts."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    source = parser.add_argument_group("prompts (default: the lines of the standard input)")
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times"
    )
    source.add_argument(
        "--prompts", metavar="FILE", help="a file with one prompt a line; - is the standard input"
    )
    source.add_argument(
        "--chat", action="store_true", help="take each prompt as a user's message to an assistant"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default: 128")
    sampling.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: 0, which is greedy"
    )
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1, off")
    sampling.add_argument("--top-k", type=int, default=-1, metavar="K", help="default: -1, off")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="default: 0, off")
    sampling.add_argument("--seed", type=int, metavar="N", help="makes the draws reproducible")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text at which to end"
    )
    sampling.add_argument(
        "--ignore-eos", action="store_true", help="do not end at the model's end tokens"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--logprobs",
        type=int,
        nargs="?",
        const=0,
        metavar="K",
        help="print each token's log-probability, with the K most likely candidates",
    )
    output.add_argument(
        "--expert-load",
        metavar="FILE",
        help="count how often each expert is chosen, for --init-expert-location",
    )
    output.add_argument("--json", action="store_true", help="print one JSON document")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = engine_config_from(args)
    if args.expert_load is not None:
        make_folder(Path(args.expert_load).parent)
        config = replace(config, record_expert_load=True)
    prompts = _prompts(args)

    from isomoe.engine import LLM, SamplingParams

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
        logprobs=args.logprobs,
    )
    with progress_bar("loading") as loading:
        llm = LLM.from_config(config, loading)
    with llm:
        if args.chat:
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = [llm.tokenizer.chat(message) for message in messages]
        start = time.perf_counter()
        with progress_bar("generating") as generating:
            outputs = llm.generate(prompts, params, generating)
        seconds = time.perf_counter() - start
        if args.expert_load is not None:
            counts = json.dumps({"logical_count": llm.expert_load()})
            write_atomically(Path(args.expert_load), counts + "\n")
        if args.json:
            print(json.dumps(_document(llm, outputs, seconds), ensure_ascii=False))
        else:
            _print_outputs(llm, outputs)
            tokens = sum(len(output.token_ids) for output in outputs)
            print(
                f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s), "
                f"{config.parallelism}",
                file=sys.stderr,
            )
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt and args.prompts:
        raise RequestError("--prompt and --prompts: give one of them")
    if args.prompt:
        return list(args.prompt)
    if args.prompts and args.prompts != "-":
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--prompts {args.prompts}: not readable ({error})") from None
    elif sys.stdin.isatty() and not args.prompts:
        raise RequestError("no prompt: give --prompt, --prompts or lines on the standard input")
    else:
        lines = sys.stdin.read().splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise RequestError("no prompt: the input has no line that is not blank")
    return prompts


def _document(llm: "LLM", outputs: "list[RequestOutput]", seconds: float) -> dict[str, object]:
    return {
        "model_path": llm.config.model_path,
        "layout": str(llm.config.parallelism),
        "dtype": llm.info.dtype,
        "device": llm.info.device,
        "outputs": [output.to_json() for output in outputs],
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "output_tokens": sum(len(output.token_ids) for output in outputs),
        "seconds": round(seconds, 6),
    }


def _print_outputs(llm: "LLM", outputs: "list[RequestOutput]") -> None:
    for index, output in enumerate(outputs):
        if len(outputs) > 1:
            print(f"{'' if index == 0 else chr(10)}# {output.prompt!r}")
        print(output.text)
        if output.logprobs is not None:
            print(f"\n{'token':>20} {'id':>8} {'logprob':>10}  candidates")
            for token in output.logprobs:
                others = "  ".join(
                    f"{llm.tokenizer.token(one)!r} {logprob:.4f}" for one, logprob in token.top
                )
                text = repr(llm.tokenizer.token(token.token_id))
                print(f"{text:>20} {token.token_id:>8} {token.logprob:>10.4f}  {others}".rstrip())
