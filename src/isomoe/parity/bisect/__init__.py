"""Where two layouts part: hidden states at every station of the residual stream, side by side."""

from isomoe.parity.bisect.result import Bisection, Culprit, Defect, Point
from isomoe.parity.bisect.run import MAX_TOKENS, NUM_PROMPTS, Side, bisect, side_of
from isomoe.parity.bisect.stations import Kind

__all__ = [
    "MAX_TOKENS",
    "NUM_PROMPTS",
    "Bisection",
    "Culprit",
    "Defect",
    "Kind",
    "Point",
    "Side",
    "bisect",
    "side_of",
]
