"""Layout algebra: mesh, placements, moves, rows, cost and plan. Imports no torch."""

from isomoe.layout.chain import BlockSpec, Chain, ReadSpec, Variant
from isomoe.layout.cost import (
    MACHINES,
    CostModel,
    FittedLink,
    Link,
    Machine,
    Rate,
    Rates,
    ring_share,
)
from isomoe.layout.mesh import Axes, Mesh, Seat
from isomoe.layout.moves import Move, Op, cheapest
from isomoe.layout.parallelism import Parallelism
from isomoe.layout.placement import Letter, Placement, row_sharded
from isomoe.layout.plan import Plan, ReadPlan, Regime, RegimePlan, Settle, regimes
from isomoe.layout.planner import Choice, Planner, make_plan
from isomoe.layout.rows import LogitsRows, Rows, TokenRows

__all__ = [
    "MACHINES",
    "Axes",
    "BlockSpec",
    "Chain",
    "Choice",
    "CostModel",
    "FittedLink",
    "Letter",
    "Link",
    "LogitsRows",
    "Machine",
    "Mesh",
    "Move",
    "Op",
    "Parallelism",
    "Placement",
    "Plan",
    "Planner",
    "Rate",
    "Rates",
    "ReadPlan",
    "ReadSpec",
    "Regime",
    "RegimePlan",
    "Rows",
    "Seat",
    "Settle",
    "TokenRows",
    "Variant",
    "cheapest",
    "make_plan",
    "regimes",
    "ring_share",
    "row_sharded",
]
