"""The adapter to DeepEP, against a stand-in for the package and against torch's all-to-all.

The stand-in follows the docstrings of `deep_ep.Buffer` (deepseek-ai/DeepEP, deep_ep/buffer.py of
version 1.2, deep_ep/buffers/legacy.py of version 2) and the checks on the host in front of its
kernels (csrc/deep_ep.cpp). It shares no code with the exchanges under test. All numbers are such
that every sum is exact, in any order.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from isomoe.comm import CommExchange, Communicator, ExpertExchange, RoutedRows, SimWorld
from isomoe.comm.deepep import (
    DeepEpExchange,
    DeepEpMode,
    DeepEpSettings,
    check_available,
    open_deepep,
)
from isomoe.errors import ConfigError
from isomoe.layout import (
    A2ABackend,
    Axes,
    Mesh,
    Move,
    Op,
    Parallelism,
    Placement,
    TokenRows,
    WireFormat,
)
from isomoe.stream import ResidualStream

HIDDEN = 2048
MAX_ROWS = 8


@dataclass
class Group:
    """A process group, as far as it is needed, of simulated ranks."""

    comm: Communicator
    axes: Axes

    def rank(self) -> int:
        return self.comm.seat.index(self.axes)

    def size(self) -> int:
        return self.comm.seat.mesh.size_of(self.axes)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Each member's tensor; they may differ in rows."""
        ones = [1] * self.size()
        counts = self.comm.all_gather(torch.tensor([len(x)]), self.axes, ones).tolist()
        raw = x.contiguous().view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x
        return list(self.comm.all_gather(raw, self.axes, counts).view(x.dtype).split(counts))


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 3 * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 5 * hidden_bytes * num_ranks


@dataclass
class Handle:
    """Where each received row came from: [..., 2], its rank and its place there; -1: none."""

    sources: Tensor
    num_tokens: int
    layout: tuple[int, int, int] | None = None


class Buffer:
    """`deep_ep.Buffer` by its documentation, on tensors of the host."""

    num_sms = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
    ) -> None:
        assert not low_latency_mode or num_qps_per_rank > 0
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.num_qps_per_rank = num_qps_per_rank
        self.zeros_for: object = "any"  # a new buffer is all zeros
        self.log: list[str] = []

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        return 2 * num_max_dispatch_tokens_per_rank * hidden * num_experts

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Any]:
        assert topk_idx.dtype is torch.int64
        assert topk_idx.is_contiguous()
        ranks = self.group.size()
        goes = torch.zeros(len(topk_idx), ranks, dtype=torch.bool)
        per_expert = torch.zeros(num_experts, dtype=torch.int32)
        for token, chosen in enumerate(topk_idx.tolist()):
            for expert in chosen:
                if expert >= 0:
                    goes[token, expert // (num_experts // ranks)] = True
                    per_expert[expert] += 1
        return goes.sum(0, dtype=torch.int32), None, per_expert, goes, object()

    def dispatch(
        self,
        x: Any,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Any, Tensor, Tensor, list[int], Handle, Any]:
        assert handle is None
        assert topk_idx is not None
        assert topk_weights is not None
        assert num_tokens_per_expert is not None
        assert is_token_in_rank is not None
        assert self.num_nvl_bytes > 0
        self.log.append("dispatch")
        self.zeros_for = None
        ranks, experts = self.group.size(), len(num_tokens_per_expert)
        layout = self.get_dispatch_layout(topk_idx, experts)
        given = (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank)
        for ours, theirs in zip((layout[0], layout[2], layout[3]), given, strict=True):
            assert theirs is not None
            assert torch.equal(ours, theirs)
        codes, scales = x if isinstance(x, tuple) else (x, None)
        assert codes.is_contiguous()
        assert topk_weights.dtype is torch.float32
        if scales is None:
            assert codes.dtype is torch.bfloat16
        else:
            assert codes.dtype is torch.float8_e4m3fn
            assert scales.dtype is torch.float32
            assert scales.shape == (len(codes), codes.shape[1] // 128)
        assert len(codes) == len(topk_idx) == len(topk_weights)
        held = [self.group.gather(codes), self.group.gather(topk_idx)]
        held.append(self.group.gather(topk_weights))
        if scales is not None:
            held.append(self.group.gather(scales))
        here = experts // ranks
        first = self.group.rank() * here
        sources = [
            (rank, token)
            for rank in range(ranks)
            for token, chosen in enumerate(held[1][rank].tolist())
            if any(first <= expert < first + here for expert in chosen)
        ]

        def received(of: list[Tensor]) -> Tensor:
            rows = [of[rank].view(torch.uint8)[token] for rank, token in sources]
            raw = torch.stack(rows) if rows else of[0].view(torch.uint8)[:0]
            return raw.view(of[0].dtype)

        idx, weights = received(held[1]), received(held[2])
        local = (idx >= first) & (idx < first + here)
        idx, weights = torch.where(local, idx - first, -1), torch.where(local, weights, 0.0)
        counts = [int((idx == expert).sum()) for expert in range(here)]
        rows = received(held[0])
        got = rows if scales is None else (rows, received(held[3]))
        table = torch.tensor(sources, dtype=torch.int64).view(-1, 2)
        return got, idx, weights, counts, Handle(table, len(topk_idx)), object()

    def combine(self, x: Tensor, handle: Handle) -> tuple[Tensor, None, Any]:
        assert x.dtype is torch.bfloat16
        assert x.is_contiguous()
        assert len(x) == len(handle.sources)
        self.log.append("combine")
        self.zeros_for = None
        total = torch.zeros(handle.num_tokens, x.shape[1])
        for rows, sources in zip(
            self.group.gather(x), self.group.gather(handle.sources), strict=True
        ):
            for row, (rank, token) in zip(rows, sources.tolist(), strict=True):
                if rank == self.group.rank():
                    total[token] += row
        return total.bfloat16(), None, object()

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        self.group.gather(torch.zeros(1))  # all ranks must call it: it has a barrier
        self.log.append("clean")
        self.zeros_for = (num_max_dispatch_tokens_per_rank, hidden, num_experts)

    def _needs(self, layout: tuple[int, int, int]) -> None:
        most, hidden, experts = layout
        ranks = self.group.size()
        assert self.low_latency_mode
        assert experts % ranks == 0
        hint = self.get_low_latency_rdma_size_hint(most, hidden, ranks, experts)
        assert hint <= self.num_rdma_bytes
        assert self.zeros_for in ("any", layout), "the buffer is dirty"
        self.zeros_for = layout

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
    ) -> tuple[Tensor, Tensor, Handle, Any, Any]:
        assert not use_fp8
        assert x.dtype is torch.bfloat16
        assert x.is_contiguous()
        assert topk_idx.dtype is torch.int64
        assert topk_idx.is_contiguous()
        assert len(x) == len(topk_idx) <= num_max_dispatch_tokens_per_rank
        self.log.append("low_latency_dispatch")
        layout = (num_max_dispatch_tokens_per_rank, x.shape[1], num_experts)
        self._needs(layout)
        ranks, rank = self.group.size(), self.group.rank()
        here, places = num_experts // ranks, ranks * num_max_dispatch_tokens_per_rank
        values, chosen = self.group.gather(x), self.group.gather(topk_idx)
        got = torch.full((here, places, x.shape[1]), torch.nan, dtype=torch.bfloat16)
        sources = torch.full((here, places, 2), -1)
        counts = torch.zeros(here, dtype=torch.int32)
        for local in range(here):
            order = torch.randperm(ranks, generator=torch.Generator().manual_seed(local + rank))
            for source in order.tolist():  # whichever comes first
                hits = (chosen[source] == rank * here + local).any(1).nonzero()[:, 0]
                for token in hits.tolist():
                    place = int(counts[local])
                    got[local, place] = values[source][token]
                    sources[local, place] = torch.tensor((source, token))
                    counts[local] += 1
        return got, counts, Handle(sources, len(x), layout), object(), None

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Handle
    ) -> tuple[Tensor, Any, None]:
        assert handle.layout is not None
        self._needs(handle.layout)
        most, hidden, experts = handle.layout
        ranks = self.group.size()
        here = experts // ranks
        assert x.dtype is torch.bfloat16
        assert x.is_contiguous()
        assert x.shape == (here, ranks * most, hidden)
        assert topk_weights.dtype is torch.float32
        assert len(topk_idx) == len(topk_weights) == handle.num_tokens
        assert topk_idx.is_contiguous()
        assert topk_weights.is_contiguous()
        self.log.append("low_latency_combine")
        made = torch.stack(self.group.gather(x)).flatten(0, 1)
        sources = torch.stack(self.group.gather(handle.sources)).flatten(0, 1)
        total = torch.zeros(handle.num_tokens, hidden)
        for token in range(handle.num_tokens):
            mine = torch.tensor((self.group.rank(), token))
            for expert, weight in zip(topk_idx[token], topk_weights[token], strict=True):
                if expert >= 0:
                    (place,) = (sources[expert] == mine).all(1).nonzero()[:, 0].tolist()
                    total[token] += weight * made[expert, place]
        return total.bfloat16(), object(), None


@pytest.fixture
def deep_ep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("deep_ep")
    module.__spec__ = ModuleSpec("deep_ep", None)
    module.Buffer = Buffer  # type: ignore[attr-defined]
    module.topk_idx_t = torch.int64  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    return module


@dataclass
class Case:
    """One exchange: rows of each member of the group, and experts of a rank."""

    rows: Sequence[int]
    per_rank: int
    top_k: int
    only: range | None = None  # these experts alone are chosen
    fp8: bool = False
    seed: int = 0


CASES = {
    "random": Case([5, 3, 7, 1], per_rank=4, top_k=4),
    "random again": Case([2, 8, 4, 6], per_rank=3, top_k=5, seed=1),
    "ranks without rows": Case([0, 6, 0, 8], per_rank=4, top_k=3),
    "nobody has rows": Case([0, 0, 0, 0], per_rank=2, top_k=2),
    "one rank has all experts that are chosen": Case([2, 8, 1, 4], 4, 4, only=range(8, 12)),
    "more experts a row than a rank has": Case([4, 4, 4, 4], per_rank=1, top_k=3),
    "one expert a row": Case([8, 2, 3, 4], per_rank=3, top_k=1),
}


def routed(case: Case, member: int, members: int) -> RoutedRows:
    """Some rows choose fewer experts, and some none: padding."""
    rng = torch.Generator().manual_seed(1000 * case.seed + member)
    rows = case.rows[member]
    x = torch.randint(-1, 2, (rows, HIDDEN), generator=rng).bfloat16()
    pool = case.only or range(case.per_rank * members)
    ids = torch.stack(
        [torch.randperm(len(pool), generator=rng)[: case.top_k] + pool[0] for _ in range(rows)]
        or [torch.zeros(case.top_k, dtype=torch.int64)]
    )[:rows]
    ids[torch.rand(ids.shape, generator=rng) < 0.2] = -1
    ids[torch.rand(rows, generator=rng) < 0.2] = -1
    weights = 2.0 ** torch.randint(-1, 1, (rows, case.top_k), generator=rng)
    if not case.fp8:
        return (x,), ids.int(), weights
    scales = 2.0 ** torch.randint(0, 2, (rows, HIDDEN // 128), generator=rng)
    return (x.to(torch.float8_e4m3fn), scales), ids.int(), weights


def experts(rows: RoutedRows, held: range) -> Tensor:
    """Expert e multiplies by 1 + e % 4: the weighted sum of those of `held`, in bf16."""
    values, ids, weights = rows
    assert ids.dtype is torch.int32
    x = values[0].float()
    if len(values) == 2:
        x = x * values[1].repeat_interleave(128, 1)
    assert x.isfinite().all()
    here = (ids >= held.start) & (ids < held.stop)
    factors = torch.where(here, weights * (1 + ids % 4), 0.0).sum(1, keepdim=True)
    return (x * factors).bfloat16()


def there_and_back(
    exchange: ExpertExchange, comm: Communicator, case: Case
) -> tuple[Tensor, RoutedRows]:
    """What comes back, and what arrived."""
    axes = comm.seat.mesh.moe_ep
    member, members = comm.seat.index(axes), comm.seat.mesh.size_of(axes)
    rows = routed(case, member, members)
    arrived, sent = exchange.dispatch(rows, axes, case.per_rank, max(case.rows))
    first = member * case.per_rank
    out = experts(arrived, range(first, first + case.per_rank))
    return exchange.combine(out, sent), arrived


def opened(comm: Communicator, case: Case, **changes: Any) -> DeepEpExchange:
    group: Any = Group(comm, comm.seat.mesh.moe_ep)
    form = WireFormat.FP8 if case.fp8 else WireFormat.NONE
    return DeepEpExchange(group, settings(top_k=case.top_k, form=form, **changes), case.per_rank)


def settings(**changes: Any) -> DeepEpSettings:
    usual: dict[str, Any] = {"hidden_size": HIDDEN, "top_k": 2, "max_rows": MAX_ROWS}
    return DeepEpSettings(**(usual | changes))


def world(ranks: int, ep_size: int, dp_size: int = 1) -> SimWorld:
    return SimWorld(Mesh.of(Parallelism(tp_size=ranks, ep_size=ep_size, attn_dp_size=dp_size)))


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("mode", [DeepEpMode.NORMAL, DeepEpMode.LOW_LATENCY])
@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_torch_gives(
    name: str, mode: DeepEpMode, ranks: int, deep_ep: ModuleType
) -> None:
    """8 ranks: two of them share each expert, and there are two groups."""
    case = CASES[name]

    def rank_main(comm: Communicator) -> None:
        expected, _ = there_and_back(CommExchange(comm), comm, case)
        got, arrived = there_and_back(opened(comm, case, mode=mode), comm, case)
        assert got.dtype is torch.bfloat16
        assert torch.equal(got, expected)
        _, ids, _ = routed(case, comm.seat.index(comm.seat.mesh.moe_ep), 4)
        assert not got[(ids < 0).all(1)].any()
        if mode is DeepEpMode.LOW_LATENCY:  # only as many rows as there can be
            assert len(arrived[1]) == 4 * max(case.rows) * min(case.top_k, case.per_rank)

    world(ranks, 4).run(rank_main)


def test_packed_rows_arrive_as_they_were_sent(deep_ep: ModuleType) -> None:
    case = Case([5, 0, 7, 9], per_rank=4, top_k=4, fp8=True)

    def rank_main(comm: Communicator) -> None:
        expected, theirs = there_and_back(CommExchange(comm), comm, case)
        exchange = opened(comm, case)
        got, ours = there_and_back(exchange, comm, case)
        assert torch.equal(got, expected)
        for a, b in zip(theirs[0], ours[0], strict=True):  # both order them by rank
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        assert set(exchange._buffer.log) == {"dispatch", "combine"}

    world(4, 4).run(rank_main)


def test_auto_takes_low_latency_where_no_rank_has_many_rows(deep_ep: ModuleType) -> None:
    """And cleans the buffer where others have used it, or another number of experts has."""
    few, many = Case([2, 0, 8, 1], 4, 2), Case([1, 0, 9, 1], 4, 2)
    fewer_experts = Case([3, 8, 0, 5], 2, 2)
    steps = [few, few, many, few, fewer_experts, fewer_experts, few, many, many]
    normal, low = ["dispatch", "combine"], ["low_latency_dispatch", "low_latency_combine"]
    clean = ["clean", *low]
    wanted = [clean, low, normal, clean, clean, low, clean, normal, normal]

    def rank_main(comm: Communicator) -> None:
        exchange = opened(comm, few)
        for step, case in enumerate(steps):
            expected, _ = there_and_back(CommExchange(comm), comm, case)
            got, _ = there_and_back(exchange, comm, case)
            assert torch.equal(got, expected), step
        assert exchange._buffer.log == [call for calls in wanted for call in calls]

    world(4, 4).run(rank_main)


def test_the_buffer_is_as_large_as_its_modes_need(deep_ep: ModuleType) -> None:
    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 8)
    nvlink, low = 3 * 2 * HIDDEN * 8, 2 * MAX_ROWS * HIDDEN * 8 * 32

    def sizes(members: int, per_rank: int = 32, **changes: Any) -> tuple[int, int, bool, int]:
        group.size = lambda: members
        exchange = DeepEpExchange(group, settings(**({"top_k": 8} | changes)), per_rank)
        made = exchange._buffer
        return made.num_nvl_bytes, made.num_rdma_bytes, made.low_latency_mode, made.num_qps_per_rank

    assert sizes(8) == (nvlink, low, True, 32)
    assert sizes(8, per_rank=2) == (nvlink, low // 16, True, Buffer.num_sms)
    assert sizes(8, mode=DeepEpMode.NORMAL) == (nvlink, 0, False, Buffer.num_sms)
    assert sizes(8, mode=DeepEpMode.LOW_LATENCY) == (0, low, True, 32)
    assert sizes(16, mode=DeepEpMode.NORMAL)[1] == 5 * 2 * HIDDEN * 16  # two nodes
    for normal_only in (
        {"form": WireFormat.FP8},
        {"scales_input": True},
        {"hidden_size": 2304},
        {"top_k": 10},
    ):
        assert not sizes(8, **normal_only)[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": WireFormat.NVFP4}, "nvfp4 with --moe-a2a-backend deepep: none or fp8 would work"),
        ({"dtype": torch.float32}, "--dtype float32 .* bfloat16 alone"),
        ({"hidden_size": 2880}, "rows of 5760 bytes are no whole units of 512"),
        ({"hidden_size": 2304, "form": WireFormat.FP8}, "rows of 2304 bytes"),
        ({"form": WireFormat.FP8, "mode": DeepEpMode.LOW_LATENCY}, "fp8 packs rows before"),
        ({"scales_input": True, "mode": DeepEpMode.LOW_LATENCY}, "auto or normal would work"),
        ({"hidden_size": 2304, "mode": DeepEpMode.LOW_LATENCY}, "2304 is none of 2048"),
        ({"top_k": 10, "mode": DeepEpMode.LOW_LATENCY}, "10 experts a token"),
    ],
)
def test_what_it_cannot_do_is_refused_before_there_is_anything_to_move(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_numbers_of_ranks_that_it_is_not_made_for_are_refused(deep_ep: ModuleType) -> None:
    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 6)
    with pytest.raises(ConfigError, match=r"--ep-size 6 .* 2, 4 or 8 would work"):
        DeepEpExchange(group, settings(), 2)


def test_a_step_that_is_too_large_for_low_latency_is_refused(deep_ep: ModuleType) -> None:
    case = Case([1, 0, 9, 1], 4, 2)

    def rank_main(comm: Communicator) -> None:
        exchange = opened(comm, case, mode=DeepEpMode.LOW_LATENCY)
        with pytest.raises(ConfigError, match="9 rows a rank, and at most 8"):
            there_and_back(exchange, comm, case)

    world(4, 4).run(rank_main)


def test_a_machine_without_gpus_is_refused(
    deep_ep: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="the device is cpu; --moe-a2a-backend torch works"):
        check_available("cpu", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="CUDA GPUs, and there is none"):
        check_available("cuda", 2)


def test_ranks_that_share_gpus_are_refused(
    deep_ep: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_available("cuda", 2)
    with pytest.raises(ConfigError, match="each of the 4 ranks needs a GPU of its own"):
        check_available("cuda", 4)


def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)  # as if nobody had installed it


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, *_: Any) -> Any:
            if name == "deep_ep":
                raise ImportError("libnvshmem_host.so.3: cannot open shared object file")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (absent, r"the DeepEP package \(deep_ep\) is not installed; --moe-a2a-backend torch works"),
        (broken, "does not load: libnvshmem"),
    ],
)
def test_a_missing_or_broken_package_is_refused(
    state: Callable[[pytest.MonkeyPatch], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state(monkeypatch)
    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 8)
    with pytest.raises(ConfigError, match=message):
        DeepEpExchange(group, settings(), 2)


def test_a_missing_package_is_found_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("isomoe.comm.deepep.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\(deep_ep\) is not installed"):
        check_available("cuda", 2)


def test_a_package_without_its_buffer_is_refused(deep_ep: ModuleType) -> None:
    deep_ep.Buffer = None  # type: ignore[attr-defined]
    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 8)
    with pytest.raises(ConfigError, match="built without its Buffer"):
        DeepEpExchange(group, settings(), 2)


def test_it_is_opened_over_the_ranks_of_the_experts(deep_ep: ModuleType) -> None:
    asked = Parallelism(
        tp_size=4, ep_size=2, moe_a2a_backend=A2ABackend.DEEPEP, moe_wire_format=WireFormat.FP8
    )

    def rank_main(comm: Communicator) -> None:
        from isomoe.comm.torch_comm import NcclComm

        axes = comm.seat.mesh.moe_ep
        group: Any = Group(comm, axes)
        nccl = NcclComm(comm.seat, {axes: group})
        exchange = open_deepep(nccl, settings(form=WireFormat.FP8), 2)
        assert exchange._buffer.group is group
        assert not exchange._buffer.low_latency_mode

    SimWorld(Mesh.of(asked)).run(rank_main)


def test_the_stream_tells_all_ranks_of_a_group_the_same_most() -> None:
    """Rows of 4 ranks, all of them S, of which pairs exchange."""

    class Recorder(CommExchange):
        def dispatch(self, rows: RoutedRows, axes: Axes, per_rank: int, most: int) -> Any:
            told.append((self._comm.seat.rank, len(rows[1]), most))
            return super().dispatch(rows, axes, per_rank, most)

    told: list[tuple[int, int, int]] = []
    mesh = Mesh.of(Parallelism(tp_size=4, attn_dp_size=4, ep_size=4))
    rows = TokenRows.of(mesh, [3, 0, 7, 1])
    placement = Placement("S")
    moves = tuple(Move(op, mesh.moe_ep, placement, placement) for op in (Op.DISPATCH, Op.COMBINE))
    plan: Any = SimpleNamespace(reads=(), inner=(("experts", moves),))

    def rank_main(comm: Communicator) -> None:
        stream = ResidualStream(plan, comm, rows, torch.float32, Recorder(comm))
        here = (3, 0, 7, 1)[comm.seat.rank]
        ids = torch.zeros(here, 1, dtype=torch.int32)
        _, arrived, _ = stream.spread("experts", ((torch.ones(here, 2),), ids, ids.float()), 1)
        assert len(arrived) == (11 if comm.seat.rank == 0 else 0)
        back = stream.unite("experts", torch.ones(len(arrived), 2))
        assert back.shape == (here, 2)

    SimWorld(mesh).run(rank_main)
    assert sorted(told) == [(0, 3, 7), (1, 0, 7), (2, 7, 7), (3, 1, 7)]
