"""Layout algebra: mesh, placements, moves, rows, cost and plan. Imports no torch."""

from isomoe.layout.chain import BlockSpec, Chain, ReadSpec, Variant
from isomoe.layout.cost import GLOO, H100, MACHINES, CostModel, Machine
from isomoe.layout.mesh import Axes, Mesh, Seat
from isomoe.layout.moves import Move, Op, cheapest
from isomoe.layout.parallelism import Parallelism
from isomoe.layout.placement import Letter, Placement, row_sharded
from isomoe.layout.plan import Plan, ReadPlan, Regime, RegimePlan, Settle, regimes
from isomoe.layout.planner import Choice, Planner, make_plan
from isomoe.layout.rows import LogitsRows, Rows, TokenRows

__all__ = [
    "GLOO",
    "H100",
    "MACHINES",
    "Axes",
    "BlockSpec",
    "Chain",
    "Choice",
    "CostModel",
    "Letter",
    "LogitsRows",
    "Machine",
    "Mesh",
    "Move",
    "Op",
    "Parallelism",
    "Placement",
    "Plan",
    "Planner",
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
    "row_sharded",
]
