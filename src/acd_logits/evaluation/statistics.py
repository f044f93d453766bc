"""The statistics of a report: intervals of rates, paired comparison of two arms, agreement of two judges."""

from __future__ import annotations

import math
import random
from collections import Counter
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate.

    Args:
        successes: how often it happened.
        n: out of how many.
        confidence: of the interval.

    Returns:
        Its lower and upper end; 0 and 1 if n is 0.
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def rate(successes: int, n: int) -> dict[str, Any]:
    """A rate as a summary holds it: `count`, `n`, `rate` (`None` if n is 0) and its 95 % `interval`."""
    return {
        "count": successes,
        "n": n,
        "rate": successes / n if n else None,
        "interval": wilson_interval(successes, n),
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test of two arms on the same requests, two-sided.

    Args:
        only_first: requests on which only the first arm succeeded.
        only_second: requests on which only the second one did.

    Returns:
        The p-value of both succeeding equally often; 1 if they never differ.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's kappa: how much more two judges agree than chance would have it.

    Args:
        first: the labels of the first judge.
        second: those of the second one, of the same items.

    Returns:
        1 for full agreement, 0 for that of chance; NaN if both gave one and the same label to all, or none.
    """
    n = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True))
    ours, theirs = Counter(first), Counter(second)
    by_chance = sum(ours[label] * theirs[label] for label in ours)
    if by_chance == n * n:
        return math.nan
    return (agreed * n - by_chance) / (n * n - by_chance)


def kappa(pairs: Sequence[tuple[Hashable, Hashable]], resamples: int = 1000) -> dict[str, Any]:
    """The agreement of two judges as a summary holds it.

    Args:
        pairs: of each item, the labels of both judges.
        resamples: of the items, with replacement, from which the interval is taken (percentile bootstrap).

    Returns:
        `n`, Cohen's `kappa` (`None` where it is not defined) and its 95 % `interval` (`None` likewise).
    """
    value = _kappa(pairs)
    draw = random.Random(0)
    again = (_kappa(draw.choices(pairs, k=len(pairs))) for _ in range(resamples if value is not None else 0))
    found = sorted(some for some in again if some is not None)
    cut = int(0.025 * len(found))
    return {"n": len(pairs), "kappa": value, "interval": [found[cut], found[-1 - cut]] if found else None}


def _kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    value = cohen_kappa(*zip(*pairs, strict=True)) if pairs else math.nan
    return None if math.isnan(value) else value
