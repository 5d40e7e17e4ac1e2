"""Means over seeds with Student's t interval, in closed form: degrees of freedom are whole numbers here."""

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


def within(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) * tan(angle)) for Student's T; Abramowitz & Stegun 26.7.3 and 26.7.4.

    Args:
        angle: in radians, from 0 to pi/2.
        freedom: degrees of freedom, at least 1.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    if freedom == 1:
        return 2 * angle / math.pi
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for place in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (place - 1) / place
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def critical(freedom: int) -> float:
    """The t that holds CONFIDENCE of the distribution between -t and t."""
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < CONFIDENCE else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def margin(values: Sequence[float]) -> float | None:
    """Half the width of the mean's interval; None for fewer than two values."""
    if len(values) < 2:
        return None
    return critical(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
