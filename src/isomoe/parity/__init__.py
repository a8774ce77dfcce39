"""Parity: what two layouts say to the same prompts, token by token."""

from isomoe.parity.compare import TOLERANCES, Comparison, Recording, Tolerance, Verdict, compare
from isomoe.parity.engine_target import EngineTarget
from isomoe.parity.inject import injectable, instrument_of
from isomoe.parity.measure import record
from isomoe.parity.report import Report
from isomoe.parity.target import Target

__all__ = [
    "TOLERANCES",
    "Comparison",
    "EngineTarget",
    "Recording",
    "Report",
    "Target",
    "Tolerance",
    "Verdict",
    "compare",
    "injectable",
    "instrument_of",
    "record",
]
