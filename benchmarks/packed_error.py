"""How far packed rows move what routed experts give, layer by layer.

    python benchmarks/packed_error.py [--model-path FOLDER] [--num-prompts N] [--json FILE]

The rows are those of its held-out questions, in its own dtype: each layer's experts are computed
on them as they are and as each format rounds them. The figure is ||packed - plain|| / ||plain||
over all rows; what is rounded in one layer does not reach the next.
"""

import argparse
import json
from pathlib import Path

from torch import Tensor

from isomoe.blocks import Pack, SparseMoe, Unpack
from isomoe.engine import LLM, SamplingParams
from isomoe.engine.executor import LocalExecutor
from isomoe.layout import WireFormat
from isomoe.parity.prompts import questions

FORMATS = (WireFormat.FP8, WireFormat.NVFP4)


class Watched:
    """One layer's experts, computed beside themselves on packed rows."""

    def __init__(self, block: SparseMoe) -> None:
        self.off = dict.fromkeys(FORMATS, 0.0)
        self.size = 0.0
        self._experts = block.experts
        self._plain = block.experts.forward
        block.experts.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """As of the experts."""
        out: Tensor = self._plain(x, slots, weights)
        self.size += float(out.double().square().sum())
        for form in FORMATS:
            rounded = Unpack(form)(Pack(form).forward(x), x.dtype)
            packed = self._plain(rounded, slots, weights)
            self.off[form] += float((packed.double() - out.double()).square().sum())
        return out

    def error(self, form: WireFormat) -> float:
        """Relative, over all rows so far."""
        return float((self.off[form] / self.size) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with LLM(args.model_path, disable_radix_cache=True, disable_cuda_graph=True) as llm:
        executor = llm.core.executor
        assert isinstance(executor, LocalExecutor)
        watched = {
            index: Watched(block)
            for index, layer in enumerate(executor.worker.model.layers)
            for block in layer.ffn
            if isinstance(block, SparseMoe)
        }
        file = llm.info.folder / "heldout.jsonl"
        found = questions(file, llm.tokenizer.encode, args.num_prompts).prompts
        llm.generate([one.token_ids for one in found], SamplingParams(max_tokens=32))
    errors = {index: {str(f): one.error(f) for f in FORMATS} for index, one in watched.items()}
    print(f"{'layer':>5} " + " ".join(f"{form:>8}" for form in FORMATS))
    for index, each in errors.items():
        print(f"{index:>5} " + " ".join(f"{error:>8.4f}" for error in each.values()))
    if args.json is not None:
        args.json.write_text(json.dumps(errors, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
