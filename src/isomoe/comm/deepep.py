"""Rows to their experts and back by DeepEP: `--moe-a2a-backend deepep`.

DeepEP (github.com/deepseek-ai/DeepEP, the package `deep_ep`) moves rows between GPUs over NVLink
and RDMA. This adapts its class `Buffer`, the interface of its version 1 that version 2 keeps. It
has been checked against the documented contract of that class, with a stand-in that follows it; it
has not been run on hardware.

T: rows here   N: rows that arrived   K: experts a row   L: experts a rank   H: hidden size
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from isomoe.comm.base import Communicator
from isomoe.comm.expert_exchange import ExpertExchange, RoutedRows
from isomoe.comm.rendezvous import has_own_gpu
from isomoe.comm.torch_comm import NcclComm
from isomoe.errors import ConfigError
from isomoe.layout.mesh import Axes
from isomoe.layout.wire import WireFormat

MAX_ROWS = 128
"""SGLang's default of SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK."""
_FLAG = "--moe-a2a-backend deepep"
_PACKAGE = "the DeepEP package (deep_ep)"
_ELSE = "--moe-a2a-backend torch works everywhere"
_NVLINK_RANKS = 8
"""Up to here DeepEP takes a group for one node (its NUM_MAX_NVL_PEERS)."""
_UNIT_BYTES = 512
"""Warps copy a row so many bytes at a time; vLLM pads its rows to that."""
_LOW_LATENCY_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
"""What its low-latency kernels are compiled for (SWITCH_HIDDEN)."""
_LOW_LATENCY_TOP_K = 9
"""kNumMaxTopK of early releases; later ones take more."""

WayBack = Callable[[Tensor], Tensor]
"""[N, H] of what arrived -> [T, H]."""


class DeepEpMode(StrEnum):
    """Which kernels move the rows, as SGLang's --deepep-mode."""

    AUTO = "auto"
    """Low latency for steps of few rows on every rank, where it can be; else normal."""
    NORMAL = "normal"
    """A row goes once to each rank that has any of its experts. The host waits for the counts."""
    LOW_LATENCY = "low_latency"
    """A row goes once to each of its experts. Needs NVSHMEM. The host waits for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepEpSettings:
    """What DeepEP is asked to move, and how: all that is known before any weight is read.

    Attributes:
        hidden_size: H, of every layer.
        top_k: the most experts a row.
        form: how hidden states travel: bf16 [T, H], or e4m3 codes [T, H] with fp32 scales
            [T, H/128]. DeepEP's low-latency kernels pack by themselves, so fp8 is normal only.
        dtype: of hidden states, and of what experts give.
        scales_input: a row's weight multiplies what an expert takes: it must know it, so normal
            only.
        mode: which kernels.
        max_rows: the most rows of a rank in a low-latency step; memory grows with it. DeepEP's
            default queues take up to 511.

    Raises:
        ConfigError: if DeepEP cannot do it, on whatever machine.
    """

    hidden_size: int
    top_k: int
    form: WireFormat = WireFormat.NONE
    dtype: torch.dtype = torch.bfloat16
    scales_input: bool = False
    mode: DeepEpMode = DeepEpMode.AUTO
    max_rows: int = MAX_ROWS

    def __post_init__(self) -> None:
        _check_rows(self.hidden_size, self.form, self.dtype)
        obstacle = self._no_low_latency()
        if self.mode is DeepEpMode.LOW_LATENCY and obstacle:
            raise ConfigError(f"{_FLAG} in mode {self.mode}: {obstacle}; auto or normal would work")

    @property
    def normal(self) -> bool:
        """Whether the normal kernels may be used."""
        return self.mode is not DeepEpMode.LOW_LATENCY

    @property
    def low_latency(self) -> bool:
        """Whether the low-latency kernels may be used."""
        return self.mode is not DeepEpMode.NORMAL and not self._no_low_latency()

    def check_step(self, most: int) -> None:
        """Raises ConfigError if there are no kernels for a step of up to `most` rows a rank."""
        if not self.normal and most > self.max_rows:
            raise ConfigError(
                f"{_FLAG} in mode {self.mode}: a step of {most} rows a rank, and at most "
                f"{self.max_rows} can be; auto or normal would work"
            )

    def _no_low_latency(self) -> str | None:
        """Why the low-latency kernels cannot be used; None if they can."""
        if self.form is not WireFormat.NONE:
            return f"--moe-wire-format {self.form} packs rows before they travel"
        if self.scales_input:
            return "the weights of this model's experts apply to what they take"
        if self.hidden_size not in _LOW_LATENCY_HIDDEN:
            sizes = ", ".join(map(str, _LOW_LATENCY_HIDDEN))
            return f"a hidden size of {self.hidden_size} is none of {sizes}"
        if self.top_k > _LOW_LATENCY_TOP_K:
            return f"{self.top_k} experts a token are more than {_LOW_LATENCY_TOP_K}"
        return None


def check_available(device: str, ranks: int) -> None:
    """Whether DeepEP can be used here, found out without loading it.

    Args:
        device: its kind, such as "cuda".

    Raises:
        ConfigError: if there is no GPU for each rank, or no DeepEP.
    """
    if device != "cuda" or not torch.cuda.is_available():
        found = "there is none" if device == "cuda" else f"the device is {device}"
        raise ConfigError(f"{_FLAG}: it moves rows between CUDA GPUs, and {found}; {_ELSE}")
    if not has_own_gpu(torch.device(device), ranks):
        raise ConfigError(f"{_FLAG}: each of the {ranks} ranks needs a GPU of its own; {_ELSE}")
    if find_spec("deep_ep") is None:
        raise ConfigError(f"{_FLAG}: {_PACKAGE} is not installed; {_ELSE}")


def open_deepep(comm: Communicator, settings: DeepEpSettings, per_rank: int) -> "DeepEpExchange":
    """DeepEP's exchange over the ranks of the experts. All ranks must call this.

    Args:
        per_rank: as of `DeepEpExchange`.

    Raises:
        ConfigError: if DeepEP does not load, or is not made for so many ranks.
    """
    assert isinstance(comm, NcclComm), "ranks that share GPUs are refused by check_available"
    return DeepEpExchange(comm.group(comm.seat.mesh.moe_ep), settings, per_rank)


class DeepEpExchange(ExpertExchange):
    """One rank's end of DeepEP's dispatch and combine, over one group of ranks.

    DeepEP's kernels run on a stream of its own, which the current stream and it wait for in turn.
    What experts give travels in bf16. In normal mode it is their weighted sum on each rank, in low
    latency each expert's own, which DeepEP weighs and adds in fp32 where the row came from: sums
    are rounded elsewhere than in `CommExchange`, and a row's place among those that arrive is not
    fixed.

    Args:
        group: the ranks that exchange rows, in the order of their experts.
        per_rank: the most physical experts of a rank, of all layers.

    Raises:
        ConfigError: if DeepEP does not load, or is not made for so many ranks.
    """

    def __init__(self, group: dist.ProcessGroup, settings: DeepEpSettings, per_rank: int) -> None:
        self._rank, self._members = group.rank(), group.size()
        self._settings = settings
        self._max_rows = settings.max_rows
        package = _loaded()
        self._id_dtype: torch.dtype = getattr(package, "topk_idx_t", torch.int64)
        self._buffer = self._opened(package.Buffer, group, per_rank)
        self._clean_for: int | None = None

    def dispatch(
        self, rows: RoutedRows, axes: Axes, per_rank: int, most: int
    ) -> tuple[RoutedRows, WayBack]:
        values, ids, weights = rows
        values = tuple(x.contiguous() for x in values)
        ids, weights = ids.to(self._id_dtype).contiguous(), weights.contiguous()
        if self._settings.low_latency and most <= self._max_rows:
            (x,) = values
            return self._there_at_low_latency(x, ids, weights, per_rank, most)
        self._settings.check_step(most)
        return self._there(values, ids, weights, per_rank)

    def combine(self, out: Tensor, sent: WayBack) -> Tensor:
        return sent(out)

    def _there(
        self, values: tuple[Tensor, ...], ids: Tensor, weights: Tensor, per_rank: int
    ) -> tuple[RoutedRows, WayBack]:
        self._clean_for = None  # both kinds of kernels use the same memory
        to_rank, to_node, to_expert, goes, _ = self._buffer.get_dispatch_layout(
            ids, per_rank * self._members
        )
        arrived, local, weights, _, handle, _ = self._buffer.dispatch(
            values[0] if len(values) == 1 else values,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=to_rank,
            num_tokens_per_rdma_rank=to_node,
            is_token_in_rank=goes,
            num_tokens_per_expert=to_expert,
        )
        values = arrived if isinstance(arrived, tuple) else (arrived,)
        ids = torch.where(local < 0, -1, local + self._rank * per_rank).int()
        return (values, ids, weights), partial(self._back, handle)

    def _back(self, handle: Any, out: Tensor) -> Tensor:
        total: Tensor
        total, _, _ = self._buffer.combine(out.contiguous(), handle)
        return total

    def _there_at_low_latency(
        self, x: Tensor, ids: Tensor, weights: Tensor, per_rank: int, most: int
    ) -> tuple[RoutedRows, WayBack]:
        """What arrived has a row for each expert that a row chose, of weight 1: K is 1."""
        experts = per_rank * self._members
        if self._clean_for != experts:
            # The kernels count on zeros, whose place depends on the number of experts.
            self._buffer.clean_low_latency_buffer(self._max_rows, x.shape[1], experts)
            self._clean_for = experts
        packed, counts, handle, _, _ = self._buffer.low_latency_dispatch(
            x, ids, self._max_rows, experts, use_fp8=False
        )
        # [L, places, H], of which only the first counts[l] of expert l mean anything. Those are
        # taken out, as many as there can be, so that nobody has to wait for the counts.
        places = packed.shape[1]
        bound = self._members * most * min(ids.shape[1], per_rank)
        taken = torch.arange(places, device=x.device) < counts[:, None]
        end = taken.numel()
        index = torch.nonzero_static(taken.flatten(), size=min(bound, end), fill_value=end)[:, 0]
        none = index == end
        arrived = packed.flatten(0, 1)[index.clamp(max=end - 1)]
        arrived.masked_fill_(none[:, None], 0)  # whatever lay there, experts want it finite
        chosen = torch.where(none, -1, index // places + self._rank * per_rank)
        ones = weights.new_ones(len(index), 1)
        back = partial(self._back_at_low_latency, handle, ids, weights, index, (per_rank, places))
        return ((arrived,), chosen.int()[:, None], ones), back

    def _back_at_low_latency(
        self,
        handle: Any,
        ids: Tensor,
        weights: Tensor,
        index: Tensor,
        shape: tuple[int, int],
        out: Tensor,
    ) -> Tensor:
        experts, places = shape
        # One place more, for what no expert made.
        packed = out.new_empty(experts * places + 1, out.shape[1]).index_copy_(0, index, out)
        packed = packed[:-1].view(experts, places, -1)
        total: Tensor
        total, _, _ = self._buffer.low_latency_combine(packed, ids, weights, handle)
        return total

    def _opened(self, buffer: Any, group: dist.ProcessGroup, per_rank: int) -> Any:
        """A buffer that is large enough for the modes that may be used."""
        settings, members = self._settings, self._members
        row_bytes = settings.hidden_size * torch.bfloat16.itemsize
        nvlink_bytes = rdma_bytes = queues = 0
        if settings.normal:
            try:
                configs = buffer.get_dispatch_config(members), buffer.get_combine_config(members)
            except (AssertionError, KeyError) as error:
                raise ConfigError(
                    f"--ep-size {members} with {_FLAG}: it is not prepared for so many ranks; "
                    "2, 4 or 8 would work, or --moe-a2a-backend torch"
                ) from error
            queues = buffer.num_sms
            for config in configs:
                hint = config.get_nvl_buffer_size_hint(row_bytes, members)
                nvlink_bytes = max(nvlink_bytes, hint)
                if members > _NVLINK_RANKS:
                    hint = config.get_rdma_buffer_size_hint(row_bytes, members)
                    rdma_bytes = max(rdma_bytes, hint)
        if settings.low_latency:
            experts = per_rank * members
            hint = buffer.get_low_latency_rdma_size_hint(
                self._max_rows, settings.hidden_size, members, experts
            )
            rdma_bytes, queues = max(rdma_bytes, hint), max(queues, per_rank)
        return buffer(
            group,
            nvlink_bytes,
            rdma_bytes,
            low_latency_mode=settings.low_latency,
            num_qps_per_rank=queues,
        )


def _check_rows(hidden_size: int, form: WireFormat, dtype: torch.dtype) -> None:
    """Raises ConfigError if DeepEP cannot move such rows."""
    if form is WireFormat.NVFP4:
        raise ConfigError(f"--moe-wire-format nvfp4 with {_FLAG}: none or fp8 would work")
    if dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"--dtype {name} with {_FLAG}: it moves bfloat16 alone; {_ELSE}")
    row_bytes = hidden_size * (1 if form is WireFormat.FP8 else dtype.itemsize)
    if row_bytes % _UNIT_BYTES:
        raise ConfigError(
            f"{_FLAG}: rows of {row_bytes} bytes are no whole units of {_UNIT_BYTES}; {_ELSE}"
        )


def _loaded() -> Any:
    """The package, imported only where it is asked for: it comes with its own libraries."""
    try:
        package = import_module("deep_ep")
    except (ImportError, AssertionError) as error:  # version 2 asserts which NCCL is loaded
        absent = isinstance(error, ModuleNotFoundError) and error.name == "deep_ep"
        why = "is not installed" if absent else f"does not load: {error}"
        raise ConfigError(f"{_FLAG}: {_PACKAGE} {why}; {_ELSE}") from error
    if getattr(package, "Buffer", None) is None:  # version 2 can be built so
        raise ConfigError(f"{_FLAG}: {_PACKAGE} was built without its Buffer; {_ELSE}")
    return package
