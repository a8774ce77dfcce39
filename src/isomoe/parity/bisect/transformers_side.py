"""A side of the bisection that is a transformers model in this process."""

import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from isomoe.engine.model_info import ModelInfo
from isomoe.errors import ConfigError
from isomoe.models import CausalLM
from isomoe.parity.bisect.assemble import Whole
from isomoe.parity.bisect.passes import Pass
from isomoe.parity.bisect.recorder import jittered
from isomoe.parity.bisect.stations import Kind, Station
from isomoe.parity.run import Ids
from isomoe.parity.targets.base import Stage
from isomoe.parity.transformers_model import load_model


class Reads:
    """The residual stream at every read, and between two reads what was added to it.

    Args:
        reads: for each norm in order, the rows that it read.
    """

    def __init__(self, reads: dict[str, Whole], settled: dict[str, str]) -> None:
        self._reads = reads
        self._reading = {blocks: norm for norm, blocks in settled.items()}

    def whole(self, station: Station) -> Whole:
        """All rows at a read, or the sum of what the blocks that it settles added."""
        if station.kind is Kind.READ:
            return self._reads[station.name]
        name = self._reading[station.name]
        names = list(self._reads)
        here = self._reads[name]
        if name == names[0]:
            return here
        before = self._reads[names[names.index(name) - 1]]
        return Whole.of(here.places, here.x - before.x)


class TransformersSide:
    """A checkpoint as transformers runs it.

    Args:
        path: as typed, behind `hf:`.
        info: the checkpoint that the engine runs; its dtype and device are taken.
        model: the engine's model, which knows what the norms are called.

    Attributes:
        dtype: the torch dtype's name.
    """

    def __init__(self, path: str, info: ModelInfo, model: CausalLM, stage: Stage) -> None:
        self.name = f"hf:{path}"
        self._path = path or str(info.folder)
        self._info = info
        self.dtype = info.dtype
        self._seen: dict[tuple[Ids, ...], dict[Pass, Reads]] = {}
        self._stage = stage
        self._norms = [norm.name for norm in model.norms()]
        self._layers = [
            f"{model.layers_at}.{index}" for index in range(model.num_layers(info.hf_config))
        ]
        self._embedding = model.embedding_at
        reads = model.chain.reads
        before = [model.chain.embedding.name]
        self._settled = {}
        for read in reads:
            self._settled[read.name] = " + ".join(before)
            before = [block.name for block in read.consumers]

    def record(self, prompts: Sequence[Ids], passes: Sequence[Pass]) -> dict[Pass, Reads]:
        """What it sees of the prompts, one at a time in every pass. It remembers that.

        Raises:
            TargetError: if transformers is not installed, or cannot load the model.
            ConfigError: if it names the model's norms otherwise.
        """
        texts = tuple(prompts)
        if texts not in self._seen:
            with self._stage(f"{self.name}: recording"):
                model = load_model(
                    self.name, self._path, dtype=self.dtype, device=str(self._info.device)
                )
                modules = self._modules(model)
                self._seen[texts] = {
                    now: self._run(model, modules, now.texts(texts), now is Pass.JITTERED)
                    for now in Pass
                }
        return {now: self._seen[texts][now] for now in passes}

    def _modules(self, model: Any) -> dict[str, Any]:
        """The model's modules by name, all that are needed among them."""
        modules = dict(model.named_modules())
        for name in (self._embedding, *self._norms, *self._layers):
            if name not in modules:
                raise ConfigError(
                    f"{self.name}: has no module {name}, by which name the engine knows that part; "
                    "only models that transformers names alike can be bisected"
                )
        return modules

    @torch.inference_mode()
    def _run(
        self, model: Any, modules: dict[str, Any], prompts: Sequence[Ids], jitter: bool
    ) -> Reads:
        seen: dict[str, list[Tensor]] = {name: [] for name in self._norms}
        with ExitStack() as hooks:
            for name in self._norms:
                hook = modules[name].register_forward_pre_hook(_keeps(seen[name]))
                hooks.callback(hook.remove)
            if jitter:
                for name in (self._embedding, *self._layers):
                    hooks.callback(modules[name].register_forward_hook(_jitters(name)).remove)
            for prompt in prompts:
                model(torch.tensor([prompt], device=self._info.device), use_cache=False)
        places = torch.arange(sum(map(len, prompts)))
        reads = {name: Whole.of(places, torch.cat(parts)) for name, parts in seen.items()}
        return Reads(reads, self._settled)


def _keeps(seen: list[Tensor]) -> Callable[[Any, tuple[Tensor, ...]], None]:
    """Keeps the rows that a module is called with."""

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]).float().cpu())

    return hook


def _jitters(name: str) -> Callable[[Any, Any, Any], Any]:
    """Rounds the rows that a module gives once more, at random."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        rows, *rest = output if isinstance(output, tuple) else (output,)
        rows = jittered(rows, rows.dtype, zlib.crc32(name.encode()))
        return (rows, *rest) if isinstance(output, tuple) else rows

    return hook
