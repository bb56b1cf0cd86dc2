"""What is computed from the losses: the best rate, its shift between sizes, and growth with size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Losses = Mapping[float, float]
"""Loss by learning rate; infinity for a run that diverged."""


def best(losses: Losses) -> float:
    """The rate with the lowest loss, the lower one of two that are equal.

    Raises:
        ValueError: if every run diverged.
    """
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError(f"every run diverged, at learning rates {sorted(losses)}")
    return min(sorted(finite), key=finite.__getitem__)


def is_at_end(losses: Losses) -> int:
    """-1 if the best rate is the lowest one of the grid, 1 if it is the highest one, 0 if it is inside."""
    rates = sorted(losses)
    return {rates[-1]: 1, rates[0]: -1}.get(best(losses), 0)


def interpolated(losses: Losses) -> float | None:
    """The rate at the lowest point of a parabola, in log2 of the rate, through the best rate and its two neighbours.

    None where the best rate has no neighbour on one side, or only one that diverged: there is no parabola.
    """
    rates = sorted(losses)
    middle = rates.index(best(losses))
    if middle in (0, len(rates) - 1):
        return None
    x = [math.log2(rate) for rate in rates[middle - 1 : middle + 2]]
    y = [losses[rate] for rate in rates[middle - 1 : middle + 2]]
    if not all(map(math.isfinite, y)):
        return None
    left, right = x[1] - x[0], x[1] - x[2]
    above_left, above_right = y[1] - y[0], y[1] - y[2]
    curvature = left * above_right - right * above_left
    if curvature == 0:  # three equal losses
        return rates[middle]
    return float(2 ** (x[1] - 0.5 * (left**2 * above_right - right**2 * above_left) / curvature))


def optimum(losses: Losses) -> float:
    """The interpolated rate, or the best one of the grid where there is none."""
    found = interpolated(losses)
    return best(losses) if found is None else found


def cells(rate: float, reference: float) -> float:
    """How many factors of two ``rate`` is above ``reference``."""
    return math.log2(rate / reference)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log2 of the values against log2 of the sizes: the power with which they grow."""
    x, y = [math.log2(size) for size in sizes], [math.log2(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)
