"""`isomoe serve`: the HTTP server."""

import argparse
import json
import logging
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from isomoe.cli.options import add_engine_options, engine_config_from
from isomoe.cli.progress import progress_bar
from isomoe.config import choice
from isomoe.errors import ConfigError
from isomoe.server.config import SamplingDefaults, ServerConfig

if TYPE_CHECKING:
    from isomoe.server.async_engine import AsyncEngine

NAME = "serve"
HELP = "serve a model over HTTP, as OpenAI's, SGLang's and vLLM's clients expect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    default = ServerConfig()
    add_engine_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host",
        default=default.host,
        metavar="ADDRESS",
        help="the address to listen on; 0.0.0.0 is all of them (default: %(default)s)",
    )
    group.add_argument(
        "--port",
        type=int,
        default=default.port,
        metavar="N",
        help="0 takes a free one (default: %(default)s)",
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="clients must bring it as a bearer token, but for /health (default: ISOMOE_API_KEY of "
        "the environment, else none)",
    )
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="what clients call the model (default: its path)",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja template instead of the tokenizer's",
    )
    group.add_argument(
        "--sampling-defaults",
        default=str(default.sampling_defaults),
        metavar="WHOSE",
        help=f"{', '.join(SamplingDefaults)}: temperature, top_p and the like of requests that "
        "name none are those of the checkpoint's generation_config.json, or OpenAI's "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-queued-requests",
        type=int,
        default=default.max_queued_requests,
        metavar="N",
        help="requests that may wait beside those that run; more get 429 (default: %(default)s)",
    )
    group.add_argument(
        "--max-request-bytes",
        type=int,
        default=default.max_request_bytes,
        metavar="N",
        help="the largest body; larger ones get 413 (default: %(default)s)",
    )
    group.add_argument(
        "--request-timeout-seconds",
        type=float,
        metavar="S",
        help="a request that is not finished by then gets 504 (default: no limit)",
    )
    group.add_argument(
        "--drain-timeout-seconds",
        type=float,
        default=default.drain_timeout_seconds,
        metavar="S",
        help="how long open requests may go on after SIGTERM or Ctrl-C (default: %(default)g)",
    )
    group.add_argument(
        "--record-expert-load",
        action="store_true",
        help="count how often each expert is chosen; /dump_expert_distribution_record gives it, "
        "as --init-expert-location takes it",
    )
    group.add_argument(
        "--log-requests",
        action="store_true",
        help="log bodies and outputs too, beside one line a request",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document with address and process ids when requests are taken",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    config = ServerConfig(
        engine=replace(engine_config_from(args), record_expert_load=args.record_expert_load),
        host=args.host,
        port=args.port,
        api_key=os.environ.get("ISOMOE_API_KEY") if args.api_key is None else args.api_key,
        served_model_name=args.served_model_name,
        chat_template=args.chat_template,
        sampling_defaults=choice(SamplingDefaults, args.sampling_defaults, "--sampling-defaults"),
        max_queued_requests=args.max_queued_requests,
        max_request_bytes=args.max_request_bytes,
        request_timeout_seconds=args.request_timeout_seconds,
        drain_timeout_seconds=args.drain_timeout_seconds,
        log_requests=args.log_requests,
    )
    try:
        from isomoe.server.async_engine import AsyncEngine
        from isomoe.server.serve import bind, serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"isomoe serve needs {error.name}, which is not installed: pip install 'isomoe[serve]'"
        ) from None

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s"
    )
    with bind(config) as listener:
        address = listener.getsockname()[:2]
        with progress_bar("loading") as loading:
            engine = AsyncEngine.start(config, loading)
        try:
            return serve(engine, listener, lambda: _announce(engine, address, args.json))
        finally:
            engine.shutdown()


def _announce(engine: "AsyncEngine", address: tuple[str, int], as_json: bool) -> None:
    host, port = address
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    limits, parallelism = engine.limits, engine.config.engine.parallelism
    tokens = limits.num_pages * limits.page_size
    if as_json:
        document: dict[str, Any] = {
            "url": url,
            "model": engine.model_name,
            "layout": str(parallelism),
            "pid": os.getpid(),
            "engine_pid": engine.pid,
            "worker_pids": engine.worker_pids,
        }
        print(json.dumps(document), flush=True)
    log = logging.getLogger("isomoe.server")
    log.info("model %s, %s on %s", engine.model_name, engine.info.dtype, engine.info.device)
    log.info("layout %s; plan: %s", parallelism, _summary(engine.plan))
    log.info(
        "KV cache: %d tokens (%d pages of %d) in each of %d attention groups",
        tokens,
        limits.num_pages,
        limits.page_size,
        limits.attn_dp_size,
    )
    log.info("listening on %s", url)


def _summary(plan: dict[str, Any]) -> str:
    """The plan of the smallest steps in a line: which collectives, how many."""
    regime = plan["regimes"][0]
    counts: dict[str, int] = {}
    for part in (*regime["settles"], *regime["deliveries"], *regime["inner"]):
        for move in part["moves"]:
            name = f"{move['op']}({','.join(map(str, move['axes']))})"
            counts[name] = counts.get(name, 0) + 1
    moves = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no collective"
    return f"{moves} a step of up to {regime['rows']} rows (isomoe plan shows all)"
