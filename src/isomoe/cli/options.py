"""Flags that several commands share, spelled as in SGLang."""

import argparse

from isomoe.config import Device, DType, EngineConfig, LoadFormat, MoeWeightFormat, choice
from isomoe.errors import ConfigError
from isomoe.layout import A2ABackend, Parallelism, WireFormat


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--model-path`."""
    parser.add_argument(
        "--model-path",
        "--model",
        metavar="PATH",
        help="a folder or a hub id (default: the checkpoint that ships with isomoe)",
    )


def add_layout_options(parser: argparse.ArgumentParser) -> None:
    """Adds the degrees of parallelism."""
    group = parser.add_argument_group("layout")
    group.add_argument(
        "--tp-size",
        "--tensor-parallel-size",
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="ranks of the replica (default: 1)",
    )
    group.add_argument(
        "--attn-dp-size",
        "--attention-data-parallel-size",
        type=int,
        metavar="N",
        help="groups of ranks that run attention on their own requests (default: 1)",
    )
    group.add_argument(
        "--ep-size",
        "--expert-parallel-size",
        "--ep",
        type=int,
        default=1,
        metavar="N",
        help="groups of ranks that each own a share of the experts (default: 1)",
    )
    group.add_argument(
        "--moe-dense-tp-size",
        type=int,
        metavar="N",
        help="ranks that share one dense FFN (default: all)",
    )
    group.add_argument(
        "--enable-dp-lm-head",
        action="store_true",
        help="shard the lm_head over an attention group instead of over all ranks",
    )
    group.add_argument(
        "--moe-a2a-backend",
        default=str(A2ABackend.NONE),
        metavar="BACKEND",
        help=f"{', '.join(A2ABackend)}: send each row to the ranks of its experts alone, by "
        "all-to-all (default: none)",
    )
    group.add_argument(
        "--moe-wire-format",
        default=str(WireFormat.NONE),
        metavar="FORMAT",
        help=f"{', '.join(WireFormat)}: how hidden states travel to routed experts; rounds them "
        "(default: none)",
    )
    group.add_argument(
        "--ep-num-redundant-experts",
        type=int,
        default=0,
        metavar="N",
        help="further copies of experts in each layer, to balance ranks (default: 0)",
    )
    group.add_argument(
        "--dp-size",
        "--data-parallel-size",
        "--dp",
        type=int,
        metavar="N",
        help="with --enable-dp-attention: the older spelling of --attn-dp-size",
    )
    group.add_argument(
        "--enable-dp-attention",
        action="store_true",
        help="makes --dp-size N mean --attn-dp-size N",
    )


def layout_from(args: argparse.Namespace) -> Parallelism:
    """The layout that the flags say.

    Raises:
        ConfigError: if they contradict one another, or ask for replicas.
    """
    attn_dp, dp = args.attn_dp_size, args.dp_size
    if args.enable_dp_attention:
        if dp is None:
            raise ConfigError(
                "--enable-dp-attention: --dp-size N is missing; --attn-dp-size N says both"
            )
        if attn_dp is not None and attn_dp != dp:
            raise ConfigError(
                f"--dp-size {dp} --enable-dp-attention means --attn-dp-size {dp}, "
                f"but --attn-dp-size is {attn_dp}; give one of them"
            )
        attn_dp = dp
    elif dp is not None and dp != 1:
        raise ConfigError(
            f"--dp-size {dp} counts replicas of the whole engine, and this command runs one; "
            f"--attn-dp-size {dp} (or --dp-size {dp} --enable-dp-attention) would split attention"
        )
    return Parallelism(
        tp_size=args.tp_size,
        attn_dp_size=1 if attn_dp is None else attn_dp,
        ep_size=args.ep_size,
        moe_dense_tp_size=args.moe_dense_tp_size,
        enable_dp_lm_head=args.enable_dp_lm_head,
        moe_a2a_backend=choice(A2ABackend, args.moe_a2a_backend, "--moe-a2a-backend"),
        moe_wire_format=choice(WireFormat, args.moe_wire_format, "--moe-wire-format"),
        ep_num_redundant_experts=args.ep_num_redundant_experts,
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--model-path`, the layout, and how the engine runs."""
    add_model_option(parser)
    add_layout_options(parser)
    add_runtime_options(parser)


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Adds how the engine runs, whatever the layout."""
    default = EngineConfig()
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--load-format",
        default=str(default.load_format),
        metavar="FORMAT",
        help=f"{_listed(LoadFormat)}: the checkpoint's weights, or random ones (default: auto)",
    )
    group.add_argument(
        "--dtype",
        default=str(default.dtype),
        metavar="DTYPE",
        help=f"{_listed(DType)} (default: auto, the checkpoint's)",
    )
    group.add_argument(
        "--device",
        default=str(default.device),
        metavar="DEVICE",
        help=f"{_listed(Device)} (default: auto, cuda where there is a GPU and Triton)",
    )
    group.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="the most tokens of a request, prompt and output (default: the model's)",
    )
    group.add_argument(
        "--max-running-requests",
        type=int,
        default=default.max_running_requests,
        metavar="N",
        help="requests that run at once in each attention-DP group (default: %(default)s)",
    )
    group.add_argument(
        "--max-total-tokens",
        type=int,
        metavar="N",
        help="tokens that each rank's KV cache holds (default: by memory)",
    )
    group.add_argument(
        "--page-size",
        type=int,
        metavar="N",
        help="tokens of a page of the KV cache (default: 16, or more where the model's blocks need "
        "it)",
    )
    group.add_argument(
        "--chunked-prefill-size",
        type=int,
        metavar="N",
        help="the most tokens of one prompt in a step (default: 2048, and 8192 on GPUs)",
    )
    group.add_argument(
        "--max-prefill-tokens",
        type=int,
        metavar="N",
        help="the most prompt tokens of an attention-DP group in a step "
        "(default: --chunked-prefill-size, and twice that on GPUs)",
    )
    group.add_argument(
        "--disable-radix-cache",
        action="store_true",
        help="compute every prompt in full instead of looking for its prefix in the KV cache",
    )
    group.add_argument(
        "--mem-fraction-static",
        type=float,
        default=default.mem_fraction_static,
        metavar="F",
        help="share of a GPU's memory for weights and KV cache (default: %(default)g)",
    )
    group.add_argument(
        "--disable-cuda-graph",
        action="store_true",
        help="launch every kernel of every step instead of replaying captured steps",
    )
    group.add_argument(
        "--cuda-graph-max-bs",
        type=int,
        default=default.cuda_graph_max_bs,
        metavar="N",
        help="capture steps that decode up to so many requests in each attention-DP group "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--disable-overlap-schedule",
        action="store_true",
        help="schedule a step only when the one before has ended, on GPUs too",
    )
    group.add_argument(
        "--watchdog-timeout-seconds",
        type=float,
        default=default.watchdog_timeout_seconds,
        metavar="S",
        help="a worker that is silent for so long in a step counts as dead (default: %(default)g)",
    )
    group.add_argument(
        "--random-seed",
        type=int,
        default=default.random_seed,
        metavar="N",
        help="of dummy weights, and of sampling without a seed (default: %(default)s)",
    )
    group.add_argument(
        "--moe-weight-format",
        default=str(default.moe_weight_format),
        metavar="FORMAT",
        help="how experts' weights are kept: none (in --dtype), fp8 (with a scale for each block; "
        "rounded if the checkpoint has others), or auto, which keeps those of an FP8 checkpoint on "
        "GPUs (default: %(default)s)",
    )
    group.add_argument(
        "--deepep-mode",
        default=default.deepep_mode,
        metavar="MODE",
        help="auto, normal, low_latency: of --moe-a2a-backend deepep (default: %(default)s)",
    )
    group.add_argument(
        "--init-expert-location",
        metavar="FILE",
        help="JSON with physical_to_logical_map, or with logical_count (how often each expert was "
        "chosen), from which the location is worked out (default: in order)",
    )
    group.add_argument(
        "--plan",
        metavar="FILE",
        help="follow this plan, of isomoe plan --json, once it is checked (default: the cheapest)",
    )


def engine_config_from(args: argparse.Namespace, layout: Parallelism | None = None) -> EngineConfig:
    """The configuration that the flags say.

    Args:
        layout: where the flags of `add_layout_options` are not there.

    Raises:
        ConfigError: if a value is out of range, or the layout cannot be.
    """
    return EngineConfig(
        model_path=args.model_path,
        parallelism=layout or layout_from(args),
        load_format=choice(LoadFormat, args.load_format, "--load-format"),
        dtype=choice(DType, args.dtype, "--dtype"),
        device=choice(Device, args.device, "--device"),
        context_length=args.context_length,
        max_running_requests=args.max_running_requests,
        max_total_tokens=args.max_total_tokens,
        page_size=args.page_size,
        chunked_prefill_size=args.chunked_prefill_size,
        max_prefill_tokens=args.max_prefill_tokens,
        disable_radix_cache=args.disable_radix_cache,
        mem_fraction_static=args.mem_fraction_static,
        disable_cuda_graph=args.disable_cuda_graph,
        cuda_graph_max_bs=args.cuda_graph_max_bs,
        disable_overlap_schedule=args.disable_overlap_schedule,
        watchdog_timeout_seconds=args.watchdog_timeout_seconds,
        random_seed=args.random_seed,
        moe_weight_format=choice(MoeWeightFormat, args.moe_weight_format, "--moe-weight-format"),
        deepep_mode=args.deepep_mode,
        init_expert_location=args.init_expert_location,
        plan=args.plan,
    )


def _listed(kind: type[LoadFormat] | type[DType] | type[Device]) -> str:
    return ", ".join(kind)
