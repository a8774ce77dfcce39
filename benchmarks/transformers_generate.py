"""W1 and W2 of `isomoe bench offline` through transformers' own generate, on the same device.

The same shape with random weights: normal(0, 0.02), norms 1, drawn on the device. Greedy, dynamic
cache. A token's time is the difference of two runs, of one token and of --output-len tokens, so
that short answers will do; W1 and W2 themselves have 256.

    python benchmarks/transformers_generate.py                       # Qwen3-30B-A3B on a GPU
    python benchmarks/transformers_generate.py --model-path src/isomoe/checkpoints/arith-moe
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from isomoe.bench.device import measure_limits
from isomoe.bench.floors import ModelCounts
from isomoe.bench.offline_report import WorkloadResult, limits_line, result_line
from isomoe.bench.offline_workload import OfflineWorkload, Sample, standard_workloads
from isomoe.bench.results import conditions, read_peers, write
from isomoe.models import read_config

ROOT = Path(__file__).parents[1]
QWEN3_30B = ROOT / "src/isomoe/models/configs/qwen3-30b-a3b.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=QWEN3_30B)
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2"], choices=["W1", "W2"])
    parser.add_argument("--output-len", type=int, default=64, help="tokens of the longer run")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--experts", default="grouped_mm", help="transformers' implementation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="a file, or a folder that gets one")
    parser.add_argument("--commit", help="that the document names (default: git's)")
    args = parser.parse_args()
    if args.output_len < 2:
        parser.error("--output-len: must be at least 2, since times of two lengths are compared")
    transformers.utils.logging.disable_progress_bar()
    device, config = torch.device(args.device), read_config(args.model_path)
    limits = measure_limits(device, torch.bfloat16)
    print(limits_line(limits), flush=True)
    counts = ModelCounts.of(config)
    peers = read_peers(config)
    model = random_model(args.model_path, device, args.experts)
    results = []
    for name in args.workloads:
        workload = standard_workloads()[name]
        workload = replace(workload, output_lens=(args.output_len,) * workload.num_requests)
        result = WorkloadResult(workload, floor=workload.floor(counts, limits))
        for repeat in range(args.repeats + 1):
            sample = run_once(model, workload, config["vocab_size"], repeat, device)
            if repeat:  # the first is a warm-up
                result.samples.append(sample)
        print(result_line(result), flush=True)
        results.append(result)
    document = {
        **conditions("transformers", shlex.join(["python", *sys.argv]), args.commit),
        "device": limits.to_json(),
        "model": {
            "name": args.model_path.name.removesuffix(".json"),
            "dtype": "bfloat16",
            **asdict(counts),
        },
        "settings": {"experts": args.experts, "cache": "dynamic", "output_len": args.output_len},
        "repeats": args.repeats,
        "workloads": [result.to_json(counts, peers) for result in results],
    }
    if args.json is not None:
        print(f"written to {write(document, args.json)}")
    print(json.dumps(document))


def random_model(path: Path, device: torch.device, experts: str) -> torch.nn.Module:
    """The model of a config.json with random weights, made on the device."""
    config = AutoConfig.from_pretrained(path)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation=experts
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02)
                else:
                    parameter.fill_(1.0)
    return model


def run_once(
    model: torch.nn.Module,
    workload: OfflineWorkload,
    vocab_size: int,
    repeat: int,
    device: torch.device,
) -> Sample:
    """One repeat, with prompts of its own."""
    prompts = torch.tensor(workload.prompts(vocab_size, f"repeat {repeat}"), device=device)
    generate: Callable[..., torch.Tensor] = model.generate

    def seconds(output_len: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            out = generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=output_len,
                max_new_tokens=output_len,
                pad_token_id=0,
            )
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - began
        if out.shape[1] != prompts.shape[1] + output_len:
            raise SystemExit(f"{out.shape[1] - prompts.shape[1]} tokens, not {output_len}")
        return taken

    first = seconds(1)
    return Sample(seconds=seconds(max(workload.output_lens)), first_seconds=first)


if __name__ == "__main__":
    main()
