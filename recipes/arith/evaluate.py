"""Measures a checkpoint through transformers: accuracy, and what its mixture of experts is worth.

Accuracy is greedy and zero-shot, with its 95% Wilson interval; an answer counts if its last line
is `#### ` and the right number. The ablations double or drop the output of the MoE blocks, as a
reduction done twice or not at all would. Run as `python -m recipes.arith.evaluate DIR`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from recipes.arith.model import Block, block_forward, blocks
from recipes.arith.problems import problems
from recipes.arith.tokenizer import chat_prompt, plain_prompt
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

CHECKPOINT = "src/isomoe/checkpoints/arith-moe"
MAX_NEW_TOKENS = 160
FINAL = re.compile(r"\n#### (\d+)$")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`right` of `total`, and the 95% Wilson interval of the share."""

    right: int
    total: int
    share: float
    low: float
    high: float


def wilson(right: int, total: int, z: float = 1.959964) -> Accuracy:
    """The Wilson score interval of a share (Wilson 1927)."""
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return Accuracy(right, total, share, max(0.0, middle - half), min(1.0, middle + half))


def final_of(answer: str) -> int | None:
    """The result on the last line, or nothing if there is none."""
    found = FINAL.search(answer.rstrip())
    return int(found.group(1)) if found else None


@dataclass(slots=True)
class Measure:
    """A loaded checkpoint, and what can be measured of it."""

    model: Qwen3MoeForCausalLM
    tokenizer: PreTrainedTokenizerBase
    batch: int

    @torch.inference_mode()
    def generate(self, prompts: list[str]) -> list[list[int]]:
        """The greedy completion of each prompt as token ids, its end token included."""
        completions: list[list[int]] = []
        ends = self.model.generation_config.eos_token_id
        for start in range(0, len(prompts), self.batch):
            inputs = self.tokenizer(
                prompts[start : start + self.batch],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            ).to(self.model.device)
            output = self.model.generate(
                **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1
            )
            for row in output[:, inputs.input_ids.shape[1] :].tolist():
                end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
                completions.append(row[: end + 1])
        return completions

    def accuracy(self, prompts: list[str], answers: list[str]) -> tuple[Accuracy, list[list[int]]]:
        """Greedy accuracy of the results, and the completions."""
        completions = self.generate(prompts)
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        right = [final_of(t) == final_of(a) for t, a in zip(texts, answers, strict=True)]
        return wilson(sum(right), len(right)), completions

    @torch.inference_mode()
    def log_probabilities(self, prompts: list[str], answers: list[str]) -> list[Tensor]:
        """Per problem [answer tokens + end, 3]: log-probability of the reference, best, second."""
        encode = self.tokenizer.encode
        heads = [encode(p, add_special_tokens=False) for p in prompts]
        tails = [
            [*encode(f" {a}", add_special_tokens=False), self.tokenizer.eos_token_id]
            for a in answers
        ]
        rows: list[Tensor] = []
        for start in range(0, len(heads), 50):
            pairs = list(zip(heads, tails, strict=True))[start : start + 50]
            ids = pad_sequence(
                [torch.tensor(head + tail) for head, tail in pairs], batch_first=True
            ).to(self.model.device)
            logits = self.model(input_ids=ids).logits  # causal: padding on the right is not seen
            for (head, tail), row in zip(pairs, logits, strict=True):
                at = len(head) - 1
                found = row[at : at + len(tail)].float().log_softmax(-1).cpu()
                index = torch.tensor(tail).unsqueeze(1)
                rows.append(torch.cat([found.gather(1, index), found.topk(2, -1).values], dim=1))
        return rows

    @contextmanager
    def counting(self) -> Iterator[list[Tensor]]:
        """Counts, per layer, how many tokens each expert is given while the context is open."""
        num = self.model.config.num_experts
        counts = [torch.zeros(num, dtype=torch.long) for _ in blocks(self.model)]

        def hook(layer: int) -> Callable[..., None]:
            def count(_module: object, _inputs: object, output: tuple[Tensor, ...]) -> None:
                counts[layer] += torch.bincount(output[2].flatten().cpu(), minlength=num)

            return count

        handles = [
            block.gate.register_forward_hook(hook(layer))
            for layer, block in enumerate(blocks(self.model))
        ]
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()


def scaled(factor: float, only: Block | None = None) -> Callable[[Block, Tensor], Tensor]:
    """A forward that multiplies the MoE output, of one block or of all."""
    original = Block.forward

    def forward(block: Block, hidden_states: Tensor) -> Tensor:
        output = original(block, hidden_states)
        return output * factor if only is None or block is only else output

    return forward


def mean_delta(ones: list[Tensor], others: list[Tensor]) -> float:
    """The mean |difference| of the reference tokens' log-probabilities."""
    return float((torch.cat(ones)[:, 0] - torch.cat(others)[:, 0]).abs().mean())


def measure(path: str, device: str, dtype: str, batch: int, count: int, ablate: int) -> dict:
    """Everything, as one JSON-ready dictionary."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).to(device).eval()
    lines = (Path(path) / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    questions = [json.loads(line)["question"] for line in lines]
    answers = [json.loads(line)["answer"] for line in lines]
    plain = [plain_prompt(q) for q in questions]
    it = Measure(model, tokenizer, batch)
    report: dict = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": dtype,
    }

    started = time.monotonic()
    accuracy, completions = it.accuracy(plain, answers)
    report["plain"] = asdict(accuracy)
    report["plain_seconds"] = round(time.monotonic() - started, 1)
    report["plain_exact_text"] = statistics.fmean(
        text.strip() == answer
        for text, answer in zip(
            tokenizer.batch_decode(completions, skip_special_tokens=True), answers, strict=True
        )
    )
    lengths = [len(c) for c in completions]
    report["answer_tokens"] = {
        "deciles": [round(x) for x in statistics.quantiles(lengths, n=10)],
        "min": min(lengths),
        "max": max(lengths),
        "share_of_60_to_100": statistics.fmean(60 <= x <= 100 for x in lengths),
    }
    chat = [chat_prompt(q) for q in questions]
    report["chat"] = asdict(it.accuracy(chat, answers)[0])
    shots = "\n\n".join(f"{plain_prompt(p.question)} {p.answer}" for p in problems(0, "train", 4))
    few_shot = [f"{shots}\n\n{prompt}" for prompt in plain]
    report["plain_4_shot"] = asdict(it.accuracy(few_shot, answers)[0])

    some_prompts, some_answers = plain[:ablate], answers[:ablate]
    with it.counting() as counts:  # one at a time: no padding is counted
        for prompt, answer in zip(some_prompts, some_answers, strict=True):
            it.log_probabilities([prompt], [answer])
    report["expert_shares"] = [[round(x, 4) for x in (c / c.sum()).tolist()] for c in counts]
    whole = it.log_probabilities(some_prompts, some_answers)
    margins = torch.cat(whole)
    report["teacher_forced"] = {
        "mean_logprob": float(margins[:, 0].mean()),
        "least_margin": float((margins[:, 1] - margins[:, 2]).min()),
        "margins_below": {
            str(x): float(((margins[:, 1] - margins[:, 2]) < x).float().mean())
            for x in (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
        },
    }
    ablations: dict[str, dict] = {}
    for name, factor, layers in (
        ("all_doubled", 2.0, [None]),
        ("one_doubled", 2.0, list(range(model.config.num_hidden_layers))),
        ("one_dropped", 0.0, list(range(model.config.num_hidden_layers))),
    ):
        for layer in layers:
            only = None if layer is None else blocks(model)[layer]
            with block_forward(scaled(factor, only)):
                right = it.accuracy(some_prompts, some_answers)[0]
                others = it.log_probabilities(some_prompts, some_answers)
            ablations[name if layer is None else f"{name}.layer_{layer}"] = {
                **asdict(right),
                "mean_abs_delta_logprob": mean_delta(whole, others),
            }
    report["ablations"] = ablations
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("path", nargs="?", default=CHECKPOINT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--count", type=int, default=500, help="held-out problems")
    parser.add_argument("--ablate", type=int, default=200, help="problems for the ablations")
    parser.add_argument("--output", type=Path, help="a file for the report")
    args = parser.parse_args()
    report = measure(args.path, args.device, args.dtype, args.batch, args.count, args.ablate)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
