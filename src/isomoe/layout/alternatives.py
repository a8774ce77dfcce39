"""What a plan was chosen from: the cheapest plan under one restriction each, and what it loses by.

The runner-up of each single route is in the plan itself (`Route.beats`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from isomoe.errors import PlacementError
from isomoe.layout.chain import BlockSpec, Chain, Variant
from isomoe.layout.cost import FusedSums, Machine, Rate
from isomoe.layout.plan import Plan, Regime, RegimePlan, residual_placements
from isomoe.layout.planner import Planner

_FAVOUR_US = 1e6
"""What each fused sum is favoured by where as many as can be are wanted: more than a step takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The cheapest plan under a restriction that the plan of a regime does not keep.

    Attributes:
        what: the restriction.
        predicted_us: of all its moves.
        lost_by_us: by how much it is dearer than the plan; negative only where that is a pinned
            one, which need not be the cheapest.
    """

    what: str
    predicted_us: float
    lost_by_us: float

    def to_json(self) -> dict[str, object]:
        """{"what", "predicted_us", "lost_by_us"}."""
        return {
            "what": self.what,
            "predicted_us": round(self.predicted_us, 3),
            "lost_by_us": round(self.lost_by_us, 3),
        }


def alternatives(chain: Chain, plan: Plan) -> dict[Regime, list[Alternative]]:
    """For each regime of a plan what lost to it, the cheapest first.

    The residual in one placement at every read; each kind of block in one of its variants wherever
    it has that; no fused sums, or as many as can be. What cannot be planned is left out, and what
    the plan does anyhow.

    Args:
        chain: that the plan is of.
    """
    found: dict[Regime, list[Alternative]] = {bound.regime: [] for bound in plan.regimes}
    for restricted in _restrictions(chain, plan.machine):
        for bound in plan.regimes:
            other = restricted.plan(bound.regime)
            if other is not None and other.signature != bound.signature:
                us = restricted.real_us(other)
                lost_by = us - bound.predicted_us
                alternative = Alternative(what=restricted.what, predicted_us=us, lost_by_us=lost_by)
                found[bound.regime].append(alternative)
    for lost in found.values():
        lost.sort(key=lambda one: one.predicted_us)
    return found


class _Restricted(NamedTuple):
    """A planner that may not choose from everything.

    Attributes:
        favour_us: what each fused sum costs more than its machine says.
    """

    what: str
    planner: Planner
    machine: Machine
    favour_us: float = 0.0

    def plan(self, regime: Regime) -> RegimePlan | None:
        """The cheapest plan that is left; None if there is none."""
        try:
            return self.planner.choose(self.machine, regime).bind()
        except PlacementError:
            return None

    def real_us(self, plan: RegimePlan) -> float:
        """What one of its plans costs on the real machine."""
        fused = sum(settle.route.fused for read in plan.reads for settle in read.settles)
        return plan.predicted_us + fused * self.favour_us


def _restrictions(chain: Chain, machine: Machine) -> Iterator[_Restricted]:
    free = Planner(chain)
    yield _Restricted("the cheapest", free, machine)  # which a pinned plan need not be
    for placement in residual_placements(chain.mesh):
        what = f"residual {placement} everywhere"
        yield _Restricted(what, Planner(chain, [placement]), machine)
    for kind, variant in _choices(chain):
        what = f"{kind} {variant.needs} > {variant.gives} everywhere"
        yield _Restricted(what, Planner(_only(chain, kind, variant)), machine)
    if machine.fused is not None:
        yield _Restricted("no fused sums", free, replace(machine, fused=None))
        eager = replace(machine, fused=_favoured(machine.fused))
        yield _Restricted("fused sums wherever they can be", free, eager, _FAVOUR_US)


def _choices(chain: Chain) -> list[tuple[str, Variant]]:
    """Each variant of each kind of block, where there are several."""
    return list(
        dict.fromkeys(
            (block.kind, variant)
            for read in chain.reads
            for block in read.consumers
            if len(block.variants) > 1
            for variant in block.variants
        )
    )


def _only(chain: Chain, kind: str, variant: Variant) -> Chain:
    def restricted(block: BlockSpec) -> BlockSpec:
        offers = block.kind == kind and variant in block.variants
        return replace(block, variants=(variant,)) if offers else block

    reads = (replace(r, consumers=tuple(map(restricted, r.consumers))) for r in chain.reads)
    return replace(chain, reads=tuple(reads))


def _favoured(fused: FusedSums) -> FusedSums:
    """So cheap that a plan with one more of them is cheaper, whatever else it does."""

    def cheap(rate: Rate) -> Rate:
        return replace(rate, alpha_us=rate.alpha_us - _FAVOUR_US)

    return replace(fused, whole=cheap(fused.whole), scattered=cheap(fused.scattered))
