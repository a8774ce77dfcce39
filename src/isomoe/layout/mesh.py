"""The ranks of a replica as a few atomic axes, minor axis last.

Each kind of block factors the ranks in its own way (`attn_dp x attn_tp`, `moe_ep x moe_tp`, ...).
The common refinement of these factorings is the mesh: every group is a run of neighbouring axes.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

from isomoe.errors import ConfigError
from isomoe.layout.parallelism import Parallelism, divisors

Axes = tuple[int, ...]
"""Indices of neighbouring mesh axes, ascending."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Ranks factored into axes of size > 1, so that every group is a run of axes.

    A group's axes say along which axes its members differ. `attn_dp` are the axes along which
    attention holds different requests; `attn_tp` those along which it shares one batch.

    Attributes:
        axes: the size of each axis, major first; their product is the number of ranks.
        parallelism: the degrees that the mesh refines.
    """

    axes: tuple[int, ...]
    parallelism: Parallelism

    @classmethod
    def of(cls, parallelism: Parallelism, kv_heads: Iterable[int] = ()) -> "Mesh":
        """The common refinement of all factorings of `parallelism`.

        Args:
            kv_heads: the numbers of KV heads that occur in the model. Where attn_tp exceeds one,
                attn_tp = attn_kv x attn_rep, and the copies of a head are neighbouring ranks.

        Raises:
            ConfigError: if the strides of two factorings do not divide one another.
        """
        return _refinement(parallelism, tuple(kv_heads))

    def __post_init__(self) -> None:
        if any(size < 2 for size in self.axes) or prod(self.axes) != self.parallelism.tp_size:
            raise ConfigError(f"mesh axes {self.axes} do not factor {self.parallelism}")

    @cached_property
    def _groups(self) -> dict[tuple[int, Axes], tuple[int, ...]]:
        """Groups by their first rank and axes, made when they are asked for."""
        return {}

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        """For each axis, the ranks from it on; 1 behind the last."""
        return tuple(prod(self.axes[a:]) for a in range(len(self.axes) + 1))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.parallelism.tp_size

    @cached_property
    def all(self) -> Axes:
        """Every axis."""
        return tuple(range(len(self.axes)))

    @cached_property
    def attn_dp(self) -> Axes:
        """Axes along which attention holds different requests."""
        return self._major(self.parallelism.attn_tp)

    @cached_property
    def attn_tp(self) -> Axes:
        """Axes along which attention's heads are sharded."""
        return self._minor(self.parallelism.attn_tp)

    @cached_property
    def moe_ep(self) -> Axes:
        """Axes along which experts are owned."""
        return self._major(self.parallelism.moe_tp)

    @cached_property
    def moe_tp(self) -> Axes:
        """Axes along which each expert's width is sharded."""
        return self._minor(self.parallelism.moe_tp)

    @cached_property
    def ffn_dp(self) -> Axes:
        """Axes along which the dense FFN's weights are replicated."""
        return self._major(self.parallelism.ffn_tp)

    @cached_property
    def ffn_tp(self) -> Axes:
        """Axes along which the dense FFN's width is sharded."""
        return self._minor(self.parallelism.ffn_tp)

    @cached_property
    def lm_dp(self) -> Axes:
        """Axes along which the lm_head is replicated."""
        return self._major(self.parallelism.lm_tp)

    @cached_property
    def lm_tp(self) -> Axes:
        """Axes along which the lm_head's vocabulary is sharded."""
        return self._minor(self.parallelism.lm_tp)

    def shared_expert(self, width: int) -> Axes:
        """Axes along which a shared expert's width is sharded: the longest run of minor ones that
        divides it. None where rows choose experts before they travel: it then takes a rank's own.
        """
        if self.parallelism.routes_locally:
            return ()
        runs = (self.all[first:] for first in range(len(self.axes) + 1))
        return next(run for run in runs if width % self.size_of(run) == 0)

    def size_of(self, axes: Axes) -> int:
        """Ranks in a group over `axes`."""
        return self._strides[axes[0]] // self._strides[axes[-1] + 1] if axes else 1

    def stride_of(self, axes: Axes) -> int:
        """Distance in rank numbers between neighbours of a group over `axes` (1 if empty)."""
        return self._strides[axes[-1] + 1] if axes else 1

    def width_behind(self, prefix: int) -> int:
        """Ranks that agree on the first `prefix` axes: they are neighbours."""
        return self._strides[prefix]

    def index(self, rank: int, axes: Axes) -> int:
        """Where `rank` stands in its group over `axes`."""
        return rank // self.stride_of(axes) % self.size_of(axes)

    def group(self, rank: int, axes: Axes) -> tuple[int, ...]:
        """The ranks of `rank`'s group over `axes`, in order."""
        stride, size = self.stride_of(axes), self.size_of(axes)
        first = rank - rank // stride % size * stride
        key = (first, axes)
        if key not in self._groups:
            self._groups[key] = tuple(range(first, first + size * stride, stride))
        return self._groups[key]

    def groups(self, axes: Axes) -> list[tuple[int, ...]]:
        """All groups over `axes`, ordered by their first rank."""
        return sorted({self.group(rank, axes) for rank in range(self.size)})

    def to_json(self) -> dict[str, list[int]]:
        """The axes' sizes, and each group as indices of axes."""
        names = ("attn_dp", "attn_tp", "moe_ep", "moe_tp", "ffn_dp", "ffn_tp", "lm_dp", "lm_tp")
        return {"axes": list(self.axes), **{name: list(getattr(self, name)) for name in names}}

    def _major(self, stride: int) -> Axes:
        return tuple(a for a in self.all if prod(self.axes[a + 1 :]) >= stride)

    def _minor(self, stride: int) -> Axes:
        return tuple(a for a in self.all if prod(self.axes[a + 1 :]) < stride)


@lru_cache(maxsize=4096)
def _refinement(p: Parallelism, kv_heads: tuple[int, ...]) -> Mesh:
    strides = {
        "attn_tp": p.attn_tp,
        "moe_tp": p.moe_tp,
        "ffn_tp": p.ffn_tp,
        "lm_tp": p.lm_tp,
    }
    for heads in kv_heads:
        if p.attn_tp > heads and p.attn_tp % heads == 0:
            strides[f"attn_rep (copies of {heads} KV heads)"] = p.attn_tp // heads
    chain = sorted({1, p.tp_size, *strides.values()})
    for small, large in itertools.pairwise(chain):
        if large % small:
            names = {size: name for name, size in strides.items()}
            others = {size for name, size in strides.items() if name != "moe_tp"}
            usable = [
                str(ep)
                for ep in divisors(p.tp_size)
                if _divide_one_another({*others, p.tp_size // ep})
            ]
            advice = f"--ep-size {', '.join(usable)} would" if usable else "change --tp-size"
            raise ConfigError(
                f"{p.flags}: {names[small]}={small} and {names[large]}={large} share no mesh, "
                f"since {small} does not divide {large}; {advice}"
            )
    sizes = [large // small for small, large in itertools.pairwise(chain)]
    return Mesh(axes=tuple(reversed(sizes)), parallelism=p)


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank's place in the mesh: what blocks ask which shard is theirs."""

    mesh: Mesh
    rank: int

    def index(self, axes: Axes) -> int:
        """Where this rank stands in its group over `axes`."""
        return self.mesh.index(self.rank, axes)

    def shard(self, size: int, axes: Axes, what: str) -> tuple[int, int]:
        """This rank's [start, stop) of `size` things split evenly over `axes`.

        Raises:
            ConfigError: if they do not split evenly.
        """
        ways = self.mesh.size_of(axes)
        if size % ways:
            raise ConfigError(
                f"{self.mesh.parallelism.flags}: {ways} does not divide {size} {what}"
            )
        return self.index(axes) * (size // ways), (self.index(axes) + 1) * (size // ways)


def _divide_one_another(strides: Iterable[int]) -> bool:
    chain = sorted(strides)
    return all(large % small == 0 for small, large in itertools.pairwise(chain))
