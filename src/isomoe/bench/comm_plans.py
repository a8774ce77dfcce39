"""Whether a planner that knows alphas and betas alone picks the moves that are the fastest."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from isomoe.layout import (
    CostModel,
    Machine,
    Parallelism,
    Planner,
    Regime,
    RegimePlan,
    regimes,
)
from isomoe.models import HFConfig, build, family_of, layouts

_ROUNDING = 1e-9
"""Of sums of the same few numbers in another order, and far below any loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """One regime of one layout.

    Attributes:
        picked_us: what the moves of the planner's choice take by the readings.
        fastest_us: what those of the best choice take.
    """

    layout: Parallelism
    regime: Regime
    picked_us: float
    fastest_us: float

    @property
    def loss(self) -> float:
        """What the choice costs beyond the best, as a share of it."""
        return self.picked_us / self.fastest_us - 1 if self.fastest_us else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PickSummary:
    """Many of them.

    Attributes:
        fastest: how many lose nothing.
        within_5_percent: how many lose less than that.
        worst_loss, worst: of the one that loses most, and which it is.
    """

    regimes: int
    fastest: int
    within_5_percent: int
    worst_loss: float
    worst: str

    @classmethod
    def of(cls, found: Iterable[Pick]) -> "PickSummary | None":
        """None if there are none: no layout fits."""
        every = list(found)
        if not every:
            return None
        worst = max(every, key=lambda pick: pick.loss)
        return cls(
            regimes=len(every),
            fastest=sum(pick.loss < _ROUNDING for pick in every),
            within_5_percent=sum(pick.loss < 0.05 for pick in every),
            worst_loss=worst.loss,
            worst=f"{worst.layout}, {worst.regime.name}",
        )

    def __str__(self) -> str:
        return (
            f"of {self.regimes} regimes, the fastest moves as measured in {self.fastest}, within "
            f"5% of them in {self.within_5_percent}; at worst {self.worst_loss:.0%} slower "
            f"({self.worst})"
        )


def picks(
    config: HFConfig, ranks: int, machine: Machine, truth: Machine, buckets: Iterable[int]
) -> Iterator[Pick]:
    """The planner's choices for every layout of a model on so many ranks.

    Args:
        machine: that the planner knows.
        truth: that with the readings themselves.
    """
    for layout in layouts(family_of(config), config, ranks, min_ranks=ranks):
        chain = build(config, layout).chain
        planner = Planner(chain)
        cost = CostModel(machine=truth, mesh=chain.mesh, row_values=chain.hidden_size)
        for regime in regimes(chain.mesh, tuple(buckets)):
            picked, fastest = (planner.choose(one, regime).bind() for one in (machine, truth))
            yield Pick(
                layout=layout,
                regime=regime,
                picked_us=_microseconds(picked, cost),
                fastest_us=_microseconds(fastest, cost),
            )


def _microseconds(plan: RegimePlan, cost: CostModel) -> float:
    """All moves between the blocks of one step."""
    rows, equal = plan.regime.rows, plan.regime.equal
    total = 0.0
    for read in plan.reads:
        needs = {delivery.needs: delivery.route for delivery in read.deliveries}
        settles = [read.carry] if read.carry else []
        routes = [*(part.route for part in (*settles, *read.settles)), *needs.values()]
        for route in routes:
            total += cost.route_microseconds(route.moves, route.fused, rows, equal)
    return total
