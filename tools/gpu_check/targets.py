"""What is to be reached on a GPU, in one place: see :meth:`tools.gpu_check.report.Report.target`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A number that is to be reached.

    Attributes:
        text: what it is of.
        limit: the number.
        at_least: whether a value is to be as large, or else as small.
    """

    text: str
    limit: float
    at_least: bool

    def reached(self, value: float) -> bool:
        """Whether a value is good enough; NaN is not."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{self.text}: {'at least' if self.at_least else 'at most'} {self.limit:g}"


TARGETS = {
    "rate": Target("needed operations of a step, as a share of cuBLAS' rate in the same dtype", 0.70, True),
    "kernel rate": Target("needed operations of a symmetric product, as a share of cuBLAS' rate", 0.70, True),
    "upstream": Target("a step in one process, of the time of Megatron-Core's duplicated", 0.50, False),
    "elementwise": Target("elementwise part, bytes a second as a share of a copy's", 0.80, True),
    # Sums in another order change the mean error of bfloat16 by some thousandths.
    "error": Target("mean error of updates, as a multiple of Megatron-Core's", 1.01, False),
    "plan time": Target("step that plan --device predicts, off the measured one by a share of it", 0.10, False),
    "plan memory": Target("memory of a step beside weights and state, off the plan's by a share of it", 0.10, False),
    "graph host": Target("host time of a replay of a captured step, ms", 1.0, False),
}
