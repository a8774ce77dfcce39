"""Layout algebra: mesh, placements, moves, rows, cost and plan. Imports no torch."""

from isomoe.layout.alternatives import Alternative, alternatives
from isomoe.layout.balance import balanced, imbalance
from isomoe.layout.chain import BlockSpec, Chain, ReadSpec, Variant
from isomoe.layout.cost import (
    MACHINES,
    CostModel,
    FittedLink,
    FusedSums,
    Link,
    Machine,
    Rate,
    Rates,
    read_share,
    ring_share,
)
from isomoe.layout.expert_location import ExpertLocation
from isomoe.layout.expert_map import ExpertMap, slots_per_rank
from isomoe.layout.mesh import Axes, Mesh, Seat
from isomoe.layout.moves import Move, Op, cheapest
from isomoe.layout.parallelism import A2ABackend, Parallelism
from isomoe.layout.pinned import pinned, read_pinned
from isomoe.layout.placement import Letter, Placement, row_sharded
from isomoe.layout.plan import BUCKETS, Plan, ReadPlan, Regime, RegimePlan, Settle, regimes
from isomoe.layout.planner import Choice, Planner, make_plan
from isomoe.layout.rows import LogitsRows, Rows, TokenRows
from isomoe.layout.wire import FP8_RUN, NVFP4_RUN, Bundle, WireFormat

__all__ = [
    "BUCKETS",
    "FP8_RUN",
    "MACHINES",
    "NVFP4_RUN",
    "A2ABackend",
    "Alternative",
    "Axes",
    "BlockSpec",
    "Bundle",
    "Chain",
    "Choice",
    "CostModel",
    "ExpertLocation",
    "ExpertMap",
    "FittedLink",
    "FusedSums",
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
    "WireFormat",
    "alternatives",
    "balanced",
    "cheapest",
    "imbalance",
    "make_plan",
    "pinned",
    "read_pinned",
    "read_share",
    "regimes",
    "ring_share",
    "row_sharded",
    "slots_per_rank",
]
