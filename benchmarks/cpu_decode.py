"""Decode speed on the CPU: isomoe against transformers' generate, in one process and one run.

Each engine decodes the same prompts greedily, without stopping, with the same number of threads
and the same dtype. transformers runs batched with a dynamic cache and each of its experts
implementations; the fastest one counts. Rounds alternate between the engines, and the median round
is reported, so that a machine whose speed drifts slows both. Last line: one JSON document.

    python benchmarks/cpu_decode.py                        # the bundled checkpoint
    python benchmarks/cpu_decode.py --random               # a random checkpoint of 0.5 B parameters
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from isomoe import LLM, SamplingParams
from isomoe.weights import bundled_checkpoint

EXPERTS = ("eager", "batched_mm", "grouped_mm")

RANDOM = Path(__file__).parent / "random-0.5b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=bundled_checkpoint())
    parser.add_argument("--random", action="store_true", help="a random 0.5 B checkpoint instead")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--experts", nargs="+", default=EXPERTS, choices=EXPERTS, help="transformers' to run"
    )
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        if args.random:
            args.model_path = random_checkpoint(Path(scratch))
        results = [compare(args, batch) for batch in args.batch]
    conditions = {
        "model": "random 0.5 B" if args.random else str(args.model_path.name),
        "input_len": args.input_len,
        "output_len": args.output_len,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "read_gb_per_s": read_bandwidth() / 1e9,
    }
    print(json.dumps({"conditions": conditions, "results": results}))


def compare(args: argparse.Namespace, batch: int) -> dict[str, object]:
    """The median tokens/s of every engine at one batch size."""
    generator = torch.Generator().manual_seed(0)
    vocab = json.loads((args.model_path / "config.json").read_text())["vocab_size"]
    prompts = torch.randint(10, vocab, (batch, args.input_len), generator=generator)
    engines: dict[str, Callable[[], int]] = {}
    llm = LLM(args.model_path, dtype="bfloat16", device="cpu", max_running_requests=batch)
    params = SamplingParams(
        max_tokens=args.output_len, temperature=0.0, ignore_eos=True, detokenize=False
    )
    engines["isomoe"] = lambda: sum(
        len(out.token_ids) for out in llm.generate(prompts.tolist(), params)
    )
    for experts in args.experts:
        engines[experts] = transformers_engine(args, prompts, experts)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(args.rounds + 1):
        for name, run in engines.items():
            began = time.perf_counter()
            tokens = run()
            seconds = time.perf_counter() - began
            if tokens != batch * args.output_len:
                raise SystemExit(f"{name} made {tokens} tokens")
            if round_:  # the first is a warm-up
                times[name].append(seconds)
    llm.shutdown()
    speed = {
        name: batch * args.output_len / statistics.median(taken) for name, taken in times.items()
    }
    best = max(args.experts, key=lambda name: speed[name])
    step_bytes = bytes_per_step(args.model_path, batch)
    steps_per_s = speed["isomoe"] / batch
    rates = ", ".join(f"{name} {rate:.0f} tok/s" for name, rate in speed.items())
    print(f"batch {batch}: {rates}", flush=True)
    print(f"batch {batch}: {speed['isomoe'] / speed[best]:.2f}x of transformers with {best}")
    return {
        "batch": batch,
        "tokens_per_s": speed,
        "spread": {name: [min(taken), max(taken)] for name, taken in times.items()},
        "fastest_peer": best,
        "ratio": speed["isomoe"] / speed[best],
        "weight_bytes_per_step": step_bytes,
        "weight_gb_per_s": step_bytes * steps_per_s / 1e9,
    }


def transformers_engine(
    args: argparse.Namespace, prompts: torch.Tensor, experts: str
) -> Callable[[], int]:
    """transformers' generate with one of its experts implementations."""
    model = AutoModelForCausalLM.from_pretrained(
        args.model_path, dtype=torch.bfloat16, experts_implementation=experts
    ).eval()
    mask = torch.ones_like(prompts)

    def run() -> int:
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=args.output_len,
                max_new_tokens=args.output_len,
                pad_token_id=0,
            )
        return int((out.shape[1] - prompts.shape[1]) * out.shape[0])

    return run


def bytes_per_step(model_path: Path, batch: int) -> float:
    """Bytes of weights that a decode step must read: all but the experts that nobody chose.

    Experts are taken to be chosen at random: E (1 - (1 - K/E)^batch) of E are read.
    """
    config = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).config
    model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    embedding = model.get_input_embeddings().weight.numel()
    rest = sum(p.numel() for p in model.parameters()) - experts
    if not config.tie_word_embeddings:
        rest -= embedding
    chosen = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch
    return 2.0 * (rest + experts * chosen)


def random_checkpoint(folder: Path) -> Path:
    """A random Qwen3-MoE of 0.5 B parameters, saved in bf16."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig.from_pretrained(RANDOM)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    print(f"random checkpoint: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters")
    return folder


def read_bandwidth() -> float:
    """Bytes per second that summing 1 GiB reads, with all threads; the best of 5."""
    block = torch.ones(1 << 28)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
