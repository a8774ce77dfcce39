"""What a checkpoint's files settle: everything that the settings left open."""

import json
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from isomoe.config import Device, DType, EngineConfig, LoadFormat, MoeWeightFormat
from isomoe.engine.diffusion import check_request
from isomoe.engine.grammar import GrammarFactory
from isomoe.engine.kv_cache import pages_for
from isomoe.engine.sampling_params import SamplingParams
from isomoe.errors import ConfigError, RequestError
from isomoe.kernels import WEIGHT_BLOCK
from isomoe.models import BlockDiffusion, HFConfig, dtype_name, family_of, read_config
from isomoe.tokenizer import Tokenizer, has_tokenizer
from isomoe.weights import Fp8, Quantization, read_quantization, resolve

_LOG = logging.getLogger(__name__)
_PAGE_SIZE = 16
_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A checkpoint, and the settings that depend on it.

    Attributes:
        folder: where it lies.
        hf_config: its config.json.
        dtype: the torch dtype's name.
        quantization: how the checkpoint's weights are kept; None if they are plain.
        device: cpu or cuda.
        expert_block: rows and columns of experts' weights that share a scale, in FP8; None keeps
            them in `dtype`.
        context_length: the most tokens of a request.
        page_size: tokens of a page of the KV cache.
        diffusion: how it fills in blocks; None for a model that appends one token after the other.
        vocab_size: token ids are below it.
        eos_token_ids: the tokens that end a text.
        sampling_defaults: fields of `SamplingParams` that generation_config.json sets.
    """

    folder: Path
    hf_config: HFConfig
    dtype: str
    quantization: Quantization | None
    device: str
    expert_block: int | None
    context_length: int
    page_size: int
    diffusion: BlockDiffusion | None
    vocab_size: int
    eos_token_ids: frozenset[int]
    sampling_defaults: dict[str, float]

    @classmethod
    def of(cls, config: EngineConfig) -> "ModelInfo":
        """Reads the checkpoint's small files.

        Raises:
            CheckpointError: if there is no such checkpoint.
            ConfigError: if the settings do not fit it, or this host.
        """
        folder = resolve(config.model_path, weights=config.load_format is LoadFormat.AUTO)
        hf_config = read_config(folder)
        folder = folder if folder.is_dir() else folder.parent
        for key in ("vocab_size", "max_position_embeddings"):
            if not isinstance(hf_config.get(key), int):
                raise ConfigError(f"{folder}/config.json: {key!r} is missing")
        diffusion = family_of(hf_config).diffusion(hf_config)
        device = _device(config.device)
        quantization = read_quantization(hf_config)
        if diffusion is not None:
            _check_diffusion(config, device, diffusion)
        return cls(
            folder=folder,
            hf_config=hf_config,
            dtype=dtype_name(hf_config) if config.dtype is DType.AUTO else str(config.dtype),
            quantization=quantization,
            device=device,
            expert_block=expert_block(config.moe_weight_format, quantization, device),
            context_length=_context_length(config.context_length, hf_config, diffusion),
            page_size=_page_size(config, diffusion),
            diffusion=diffusion,
            vocab_size=hf_config["vocab_size"],
            eos_token_ids=_eos_token_ids(folder, hf_config),
            sampling_defaults=_sampling_defaults(folder, diffusion),
        )

    def grammars(self) -> GrammarFactory:
        """For outputs that must follow a grammar."""
        return GrammarFactory(self.folder, self.vocab_size, self.eos_token_ids)


def _device(asked: Device) -> str:
    if asked is Device.CPU:
        return str(Device.CPU)
    lacking = _lacks_for_cuda()
    if asked is Device.CUDA and lacking is not None:
        raise ConfigError(f"--device cuda: {lacking}; --device cpu works")
    return str(Device.CUDA if lacking is None else Device.CPU)


def _lacks_for_cuda() -> str | None:
    """What this host lacks to run on a GPU; None if it lacks nothing."""
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    if find_spec("triton") is None:
        return "Triton is missing, and pip install 'isomoe[gpu]' brings it"
    return None


def expert_block(
    asked: MoeWeightFormat, quantization: Quantization | None, device: str
) -> int | None:
    """Rows and columns of a block of experts' weights; None keeps them in the model's dtype.

    Raises:
        ConfigError: if FP8 is asked for, and cannot be.
    """
    kept = quantization if isinstance(quantization, Fp8) else None
    match asked:
        case MoeWeightFormat.AUTO:
            # On a CPU products are of values: codes would only be in the way.
            on_gpu = kept is not None and device == Device.CUDA and _has_fp8()
            return kept.square if kept is not None and on_gpu else None
        case MoeWeightFormat.FP8 if device == Device.CUDA and not _has_fp8():
            raise ConfigError(
                "--moe-weight-format fp8: this GPU has no FP8 products, which came with capability "
                "8.9; --moe-weight-format none works"
            )
        case MoeWeightFormat.FP8 if kept is not None and kept.square is None:
            rows, columns = kept.block
            raise ConfigError(
                f"--moe-weight-format fp8: the checkpoint has blocks of {rows} x {columns}, and "
                "square ones can be kept; --moe-weight-format none works"
            )
        case MoeWeightFormat.FP8:
            return WEIGHT_BLOCK if kept is None else kept.square
    return None


def _has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= _FP8_CAPABILITY


def _context_length(
    asked: int | None, hf_config: HFConfig, diffusion: BlockDiffusion | None
) -> int:
    most: int = hf_config["max_position_embeddings"]
    if asked is not None and asked > most:
        raise ConfigError(f"--context-length {asked}: the model has {most} positions")
    length = most if asked is None else asked
    if diffusion is None:
        return length
    if length < diffusion.block_size:
        raise ConfigError(
            f"--context-length {length}: a block of the model has {diffusion.block_size} tokens"
        )
    return length // diffusion.block_size * diffusion.block_size


def _page_size(config: EngineConfig, diffusion: BlockDiffusion | None) -> int:
    """As asked for; else 16, or the next multiple of the model's blocks."""
    block = 1 if diffusion is None else diffusion.block_size
    size = config.page_size or pages_for(_PAGE_SIZE, block) * block
    if size % block:
        raise ConfigError(
            f"--page-size {size}: must be a multiple of the model's block size of {block}"
        )
    if config.max_total_tokens is not None and config.max_total_tokens < size:
        raise ConfigError(
            f"--max-total-tokens {config.max_total_tokens}: not even one page of --page-size {size}"
        )
    return size


def _check_diffusion(config: EngineConfig, device: str, diffusion: BlockDiffusion) -> None:
    """Raises ConfigError if settings do not fit a model that fills in blocks."""
    if device == Device.CUDA:
        raise ConfigError("block-diffusion models do not run on GPUs yet; --device cpu works")
    size = diffusion.block_size
    flags = ("--chunked-prefill-size", "--max-prefill-tokens")
    for flag, value in zip(flags, config.prefill_limits(device), strict=True):
        if value < size:
            raise ConfigError(f"{flag} {value}: a block of the model has {size} tokens")


def _eos_token_ids(folder: Path, hf_config: HFConfig) -> frozenset[int]:
    """From generation_config.json, else config.json, else the tokenizer."""
    found = _ids(_generation_config(folder).get("eos_token_id"))
    found = found or _ids(hf_config.get("eos_token_id"))
    if not found and has_tokenizer(folder):
        found = _ids(Tokenizer(folder).eos_token_id)
    return frozenset(found)


def _sampling_defaults(folder: Path, diffusion: BlockDiffusion | None) -> dict[str, float]:
    """Those that vLLM and SGLang take from there, and that the model's kind of generation can do.

    Raises:
        ConfigError: if a value is out of range.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    config = _generation_config(folder)
    found = {name: config[name] for name in names if config.get(name) is not None}
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise ConfigError(f"{folder}/generation_config.json: {error}") from None
    if diffusion is not None:
        for name, value in list(found.items()):
            try:
                check_request(SamplingParams(**{name: value}), diffusion.block_size)
            except RequestError as error:
                _LOG.warning("generation_config.json: %s %s is left out: %s", name, value, error)
                del found[name]
    return found


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({error})") from None
    return content if isinstance(content, dict) else {}


def _ids(value: Any) -> list[int]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(one) is not int for one in found):
        raise ConfigError(f"eos_token_id is {value!r}, not a token id or a list of them")
    return found
