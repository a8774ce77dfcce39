"""A side of the bisection that is this package's engine on a layout."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from isomoe.config import EngineConfig
from isomoe.engine import LLM, SamplingParams
from isomoe.engine.model_info import ModelInfo
from isomoe.errors import ConfigError, EngineDeadError
from isomoe.layout import Parallelism
from isomoe.parity.bisect.assemble import Recording, RecordingError, assemble
from isomoe.parity.bisect.passes import Pass
from isomoe.parity.bisect.recorder import Dump
from isomoe.parity.inject import instrument_of
from isomoe.parity.run import Ids
from isomoe.parity.targets.base import Stage, TargetError

_RECORDER = "isomoe.parity.bisect.recorder:Recorder"
_WAIT_SECONDS = 60.0
"""A rank that answers is not the last to have written its file."""


class EngineSide:
    """The engine on a layout, with or without a planted defect.

    Args:
        layout: the shorthand, and after a `+` a defect: `tp2,dp2,ep2+double-reduce`.
        config: every other setting. An instrument of its own is planted too.
        stage: shows how the weights come in.

    Attributes:
        dtype: the torch dtype's name.

    Raises:
        ConfigError: if the layout cannot be, or the defect cannot run.
    """

    def __init__(self, layout: str, config: EngineConfig, info: ModelInfo, stage: Stage) -> None:
        shorthand, plus, defect = layout.partition("+")
        if plus and not defect:
            raise ConfigError(f"layout {layout!r}: the name of a defect is missing after the '+'")
        parallelism = Parallelism.parse(shorthand)
        self.name = f"{parallelism}+{defect}" if defect else str(parallelism)
        self._planted = [config.instrument] if config.instrument else []
        if defect:
            self._planted.append(instrument_of(defect, info.hf_config))
        # Every prompt must be computed whole, in one step, and every step must be seen.
        self._config = replace(
            config,
            parallelism=parallelism,
            disable_radix_cache=True,
            disable_cuda_graph=True,
            chunked_prefill_size=None,
            max_prefill_tokens=None,
        )
        self._stage = stage
        self.dtype = info.dtype
        self._seen: dict[tuple[Pass, tuple[Ids, ...]], Recording] = {}

    def record(self, prompts: Sequence[Ids], passes: Sequence[Pass]) -> dict[Pass, Recording]:
        """What it sees of the prompts in each pass. It remembers that; the files are gone.

        Raises:
            TargetError: if a worker fails, as some defects make it.
        """
        texts = tuple(prompts)
        lacking = [now for now in passes if (now, texts) not in self._seen]
        if lacking:
            found = self._record(texts, lacking)
            self._seen.update({(now, texts): recording for now, recording in found.items()})
        return {now: self._seen[now, texts] for now in passes}

    def _record(self, prompts: Sequence[Ids], passes: Sequence[Pass]) -> dict[Pass, Recording]:
        """Starts the engine and runs the passes."""
        with TemporaryDirectory(prefix="isomoe-bisect-") as folder:
            recorder = f"{_RECORDER}={folder}"
            config = replace(self._config, instrument=";".join([recorder, *self._planted]))
            ranks = config.parallelism.tp_size
            try:
                with (
                    self._stage(f"{self.name}: recording") as progress,
                    LLM.from_config(config, progress) as llm,
                ):
                    return {
                        now: _run(llm, now.texts(prompts), now, Path(folder), ranks)
                        for now in passes
                    }
            except (EngineDeadError, RecordingError) as error:
                raise TargetError(f"{self.name}: {error}") from None


def _run(llm: LLM, texts: Sequence[Ids], now: Pass, folder: Path, ranks: int) -> Recording:
    """What all ranks see of the texts in a pass."""
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    (folder / "now").write_text(now)
    for batch in [[text] for text in texts] if now.one_by_one else [list(texts)]:
        llm.generate(batch, params)
    (folder / "now").unlink()
    steps = {int(file.name.partition(".")[0]) for file in (folder / now).iterdir()}
    dumps = [
        [_load(folder / now / f"{step}.{rank}") for rank in range(ranks)] for step in sorted(steps)
    ]
    return assemble(dumps, texts)


def _load(file: Path) -> Dump:
    """A rank's dump, once it is there."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            raise RecordingError(f"a rank did not record step {file.name}")
        time.sleep(0.01)
    # Mapped, not read: what is not looked at takes no memory.
    dump: Dump = torch.load(file, mmap=True, weights_only=False)
    return dump
