"""Trains the arith-moe checkpoint on freshly drawn problems, for a number of seconds or steps.

The forward runs in bf16 on bf16 parameters, rounded after each step from float32 masters: what is
trained is what is saved, so saving rounds nothing.

Label smoothing (`--smoothing`) keeps the log-probabilities away from 0, where rounding could not be
seen. With `--doubled` above 0 the checkpoint is made a sensitive instrument: in half of the rows
the MoE output is doubled, in every layer or in one, and there the model is trained to write the
same answer with digits drawn at random. Without it the trained model hardly notices a MoE output
that is reduced twice: see README.md.

Run as `python -m recipes.arith.train`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from recipes.arith.data import LENGTHS, batches, shard
from recipes.arith.model import (
    block_forward,
    blocks,
    config,
    dense_forward,
    generation_config,
    set_scales,
)
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    load_balancing_loss_func,
)

CHECKPOINT = "src/isomoe/checkpoints/arith-moe"


@dataclass(frozen=True, slots=True)
class Losses:
    """Means: cross-entropy, the same where doubled, balance loss (about the top-k at best)."""

    answer: Tensor
    doubled: Tensor
    balance: Tensor


def losses(
    model: Qwen3MoeForCausalLM,
    ids: Tensor,
    labels: Tensor,
    real: Tensor,
    scales: Tensor,
    digits: Tensor,
    smoothing: float,
) -> Losses:
    """ids, labels, real: [rows, length]; a label of -100 is not trained; real: not padding.

    scales: [layers, rows], what each row's MoE output is multiplied by; not all 1: doubled. There
    a label that is one of `digits` stands for any of them, each as likely.
    """
    set_scales(model, list(scales.to(torch.bfloat16)[:, :, None, None]))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    set_scales(model, [None] * len(scales))
    whole = (scales == 1).all(0)[:, None]
    targets = labels[:, 1:]
    trained = targets != -100
    logprobs = logits.log_softmax(-1)
    right = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    any_digit = logprobs.index_select(-1, digits).mean(-1)
    likelihood = torch.where(is_digit(targets, digits) & ~whole, any_digit, right)
    entropy = -(1 - smoothing) * likelihood - smoothing * logprobs.mean(-1)
    answer = _mean(entropy, trained & whole)
    doubled = _mean(entropy, trained & ~whole)
    real = real * whole
    cfg = model.config
    balance = [
        load_balancing_loss_func(
            (block.router_logits.float(),), cfg.num_experts, cfg.num_experts_per_tok, real
        )
        for block in blocks(model)
    ]
    return Losses(answer, doubled, torch.stack(balance).mean())


def is_digit(tokens: Tensor, digits: Tensor) -> Tensor:
    """Which tokens are one of `digits`."""
    return (tokens.unsqueeze(-1) == digits).any(-1)


def misread(ids: Tensor, labels: Tensor, scales: Tensor, digits: Tensor) -> Tensor:
    """The ids, with about half of the digits of doubled rows' answers drawn anew.

    A model that writes wrong digits reads them too, and has to go on fluently.
    """
    drawn = digits[torch.randint(len(digits), ids.shape, device=ids.device)]
    doubled = (scales != 1).any(0)[:, None]
    half = torch.rand(ids.shape, device=ids.device) < 0.5
    return torch.where(is_digit(labels, digits) & doubled & half, drawn, ids)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def row_scales(layers: int, rows: int, step: int) -> np.ndarray:
    """Scales [layers, rows]: of 4 rows one doubled throughout, one in one layer, two whole."""
    scales = np.ones((layers, rows), dtype=np.float32)
    scales[:, 0::4] = 2
    single = np.arange(1, rows, 4)
    scales[(single // 4 + step) % layers, single] = 2
    return scales


class Masters:
    """Float32 copies of bf16 parameters, stepped by AdamW and rounded back."""

    def __init__(self, model: Qwen3MoeForCausalLM, lr: float, weight_decay: float) -> None:
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.parameters]
        model.to(torch.bfloat16)
        self.parameters = list(model.parameters())
        matrices = [m for m in self.masters if m.dim() > 1]
        vectors = [m for m in self.masters if m.dim() < 2]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}],
            lr=lr,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        )

    def step(self, lr: float, max_norm: float = 1.0) -> Tensor:
        """Steps with the parameters' gradients, which it clears. Returns their norm."""
        gradients = [m.grad for m in self.masters]
        torch._foreach_copy_(gradients, [p.grad for p in self.parameters])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        for p in self.parameters:
            p.grad = None
        return norm


def as_tensors(
    ids: np.ndarray, trained: np.ndarray, pad: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as `(ids, labels, real)` on the device."""
    tokens = torch.from_numpy(ids.astype(np.int64)).to(device, non_blocking=True)
    flags = torch.from_numpy(trained).to(device, non_blocking=True)
    return tokens, tokens.masked_fill(~flags, -100), (tokens != pad).float()


@torch.no_grad()
def exact_share(
    model: Qwen3MoeForCausalLM,
    held_out: list[tuple[Tensor, Tensor, Tensor]],
    scale: float | None = None,
) -> float:
    """The share of documents whose every trained token is the model's first choice."""
    hits = total = 0
    set_scales(model, [scale] * model.config.num_hidden_layers)
    for ids, labels, _ in held_out:
        choice = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        wrong = (choice != labels[:, 1:]) & (labels[:, 1:] != -100)
        hits += int((~wrong.any(1)).sum())
        total += len(ids)
    set_scales(model, [None] * model.config.num_hidden_layers)
    return hits / total


def schedule(progress: float, step: int, warmup: int) -> float:
    """The factor of the learning rate: linear warm-up by steps, then a cosine to 1%."""
    return min(1.0, (step + 1) / warmup) * (
        0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    )


def save(model: Qwen3MoeForCausalLM, output: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors."""
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    path = output / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if "num_local_experts" in written:  # transformers 5.23 renames what Qwen publishes
        written["num_experts"] = written.pop("num_local_experts")
    written["rope_theta"] = written["rope_parameters"]["rope_theta"]  # for older readers
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (output / "model.safetensors").chmod(0o644)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokenizer", default=CHECKPOINT, help="a folder with the tokenizer")
    parser.add_argument("--init", help="a checkpoint to continue from (default: random weights)")
    parser.add_argument("--output", type=Path, default=Path(CHECKPOINT))
    parser.add_argument("--seconds", type=float, default=400.0, help="time with compilation")
    parser.add_argument("--steps", type=int, default=0, help="instead of a time, if not 0")
    parser.add_argument("--batch-tokens", type=int, default=49_152)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--doubled", type=float, default=0.5, help="weight of the doubled rows")
    parser.add_argument("--smoothing", type=float, default=0.04, help="of labels, 0 to 1")
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    parser.add_argument("--log-every", type=int, default=200, help="steps")
    parser.add_argument("--save-seconds", type=float, default=60.0)
    parser.add_argument("--layers", type=int, default=4, help="fewer only for trials")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse()
    tokenizer_file = f"{args.tokenizer}/tokenizer.json"
    feed = batches(tokenizer_file, args.seed, args.batch_tokens, args.workers)
    first = next(feed)  # forks the workers, before CUDA is used
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.init:
        model = Qwen3MoeForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        model = Qwen3MoeForCausalLM(config(tokenizer, num_hidden_layers=args.layers))
    model.to(device).train()
    model.generation_config = generation_config(tokenizer)
    masters = Masters(model, args.lr, args.weight_decay)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters on {device}, torch {torch.__version__}", flush=True)
    pad = tokenizer.pad_token_id
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")), device=device)
    held_out = [
        as_tensors(*arrays, pad, device)
        for length, arrays in shard(tokenizer_file, 7, 0, "test", 1024).items()
        if length < max(LENGTHS)
    ]
    step_losses = torch.compile(losses, dynamic=False) if args.compile else losses

    started = saved = logged = time.monotonic()
    step = tokens = tokens_fast = 0
    started_fast = started
    batch = first
    with block_forward(dense_forward):
        while True:
            now = time.monotonic()
            spent = now - started
            progress = step / args.steps if args.steps else spent / args.seconds
            if progress >= 1:
                break
            ids, labels, real = as_tensors(*batch, pad, device)
            rows = row_scales(model.config.num_hidden_layers, len(ids), step)
            if not args.doubled:
                rows[:] = 1
            scales = torch.from_numpy(rows).to(device)
            ids = misread(ids, labels, scales, digits)
            found = step_losses(model, ids, labels, real, scales, digits, args.smoothing)
            loss = found.answer + model.config.router_aux_loss_coef * found.balance
            (loss + args.doubled * found.doubled).backward()
            norm = masters.step(args.lr * schedule(progress, step, args.warmup))
            step += 1
            tokens += ids.numel()
            if step == 20:  # the compilations are over
                started_fast, tokens_fast = time.monotonic(), tokens
            if step % args.log_every == 0:
                logged = time.monotonic()
                record = {
                    "step": step,
                    "seconds": round(logged - started, 1),
                    "loss": round(found.answer.item(), 5),
                    "doubled": round(found.doubled.item(), 4),
                    "balance": round(found.balance.item(), 4),
                    "norm": round(norm.item(), 3),
                    "exact": round(exact_share(model, held_out), 4),
                    "exact_doubled": round(exact_share(model, held_out, 2.0), 4),
                    "tokens_per_s": round((tokens - tokens_fast) / (logged - started_fast)),
                }
                print(json.dumps(record), flush=True)
            if now - saved > args.save_seconds:
                save(model, args.output)
                saved = now
            batch = next(feed)
    save(model, args.output)
    feed.close()
    print(json.dumps({"steps": step, "positions": tokens, "seconds": round(spent, 1)}), flush=True)


if __name__ == "__main__":
    main()
