"""Time in alternation, so that a machine whose speed drifts treats all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tools.bench.calibrate import multiplier
from tools.bench.ranks import World

__all__ = ["Gemm", "Plan", "quantile", "ratios", "round_count", "timed_rounds"]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        steps: rounds, if they are given.
        budget_s: seconds for the rounds of a case otherwise.
        least: rounds.
        most: rounds.
    """

    steps: int | None = None
    budget_s: float = 15.0
    least: int = 7
    most: int = 40


def round_count(plan: Plan, seconds: float) -> int:
    """How many rounds of ``seconds`` each."""
    if plan.steps is not None:
        return plan.steps
    return max(plan.least, min(plan.most, int(plan.budget_s / max(seconds, 1e-9))))


def timed_rounds(world: World, steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Call each in turn, round after round: A B C A B C.

    Args:
        world: all ranks begin each call together.
        steps: what to call, in this order on all ranks.
        rounds: how many.

    Returns:
        For each the seconds of every round, those of the slowest rank.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            world.barrier()
            start = time.perf_counter()
            step()
            world.synchronize()
            found[name].append(time.perf_counter() - start)
    return {name: world.slowest(seconds) for name, seconds in found.items()}


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of all lie, with a straight line between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90 of the ratio of two in the same round."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": quantile(each, 0.5), "p10": quantile(each, 0.1), "p90": quantile(each, 0.9)}


class Gemm:
    """A large square product, for the rate that the machine has in the same rounds.

    Attributes:
        flops: of one call.
    """

    def __init__(self, world: World, dtype: torch.dtype, size: int) -> None:
        """
        Args:
            world: gives the device.
            dtype: of the matrices; float32 products are float32 (no TF32).
            size: rows and columns; on GPUs ``repeat`` times as much work, to fill them.
        """
        self._repeat = 10 if world.device.type == "cuda" else 1
        self._a, self._b = (torch.randn(1, size, size, device=world.device).to(dtype) for _ in range(2))
        self._multiply = multiplier(world.device, dtype)
        self.flops = self._repeat * 2 * size**3

    def __call__(self) -> None:
        """Multiply."""
        for _ in range(self._repeat):
            self._multiply(self._a, self._b)
