"""Student's t distribution, which the standard library lacks. Pure."""

import math
from collections.abc import Sequence

LEAST_SPREAD = 0.05
"""What few values that happen to be alike may not undercut, as their standard deviation."""


def upper_tail(t: float, freedom: int) -> float:
    """How likely a t at least so large is, by chance.

    Half of the regularised incomplete beta function I_x(freedom/2, 1/2) at
    x = freedom / (freedom + t^2), by its continued fraction (Abramowitz and Stegun 26.5.8, 26.7.1).
    """
    x = freedom / (freedom + t * t)
    half = 0.5 * _incomplete_beta(freedom / 2, 0.5, x)
    return half if t > 0 else 1.0 - half


def exceeds(values: Sequence[float], limit: float, least_spread: float = LEAST_SPREAD) -> float:
    """How likely the mean of independent values is so far above a limit that it does not exceed.

    1 for fewer than two values.
    """
    count = len(values)
    if count < 2:
        return 1.0
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    error = math.sqrt(max(variance, least_spread**2) / count)
    return upper_tail((mean - limit) / error, count - 1)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    if x <= 0.0 or x >= 1.0:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    gammas = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(gammas + a * math.log(x) + b * math.log1p(-x)) / a
    return front / _fraction(a, b, x)


_TERMS = 300
"""Far more than it takes: 60 are enough for 10,000 degrees of freedom."""


def _fraction(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)), from its end."""
    value = 1.0
    for term in range(_TERMS, 0, -1):
        m = term // 2
        if term % 2 == 0:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        value = 1.0 + d / value
    return value
