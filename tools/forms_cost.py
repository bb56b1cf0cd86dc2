"""What a step costs in time with masters, momentum and gradients in other forms, beside float32's in the same round.

    python tools/forms_cost.py [--rounds 9] [--threads 2] [--side 1024]

12 square matrices, 5 quintic steps in float32, on the CPU. Float32 masters are copied to bfloat16 weights after the
step, as Megatron-Core does, and remainders are not. Prints medians of the processor's time, and of its ratio to that of
float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COUNT = 12
BF16, FP32 = torch.bfloat16, torch.float32
REFERENCE = ("fp32", "fp32", FP32)
CASES = [
    REFERENCE,
    ("fp32", "bf16", FP32),
    ("fp32", "int8", FP32),
    ("remainder", "fp32", FP32),
    ("remainder", "fp32", BF16),
    ("remainder", "bf16", BF16),
    ("remainder", "int8", BF16),
]
"""Masters, momentum, gradients."""


def step_of(master: str, momentum: str, gradient: torch.dtype, side: int) -> Callable[[], None]:
    """The step of an optimizer of its own, of the same weights and gradients."""
    from megatron_muon import Muon

    generator = torch.Generator().manual_seed(1)
    weights = [(0.02 * torch.randn(side, side, generator=generator)).to(BF16) for _ in range(COUNT)]
    params = [torch.nn.Parameter(weight if master == "remainder" else weight.float()) for weight in weights]
    for param in params:
        param.decoupled_grad = torch.randn(param.shape, generator=generator).to(gradient)
    optimizer = Muon(params, lr=1e-3, fp32_matmul_prec="highest", master=master, momentum_dtype=momentum)

    def step() -> None:
        optimizer.step()
        if master == "fp32":
            torch._foreach_copy_(weights, [param.detach() for param in params])

    return step


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--side", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = {case: step_of(*case, arguments.side) for case in CASES}
    found: dict[Any, list[float]] = {case: [] for case in CASES}
    for number in range(arguments.rounds + 2):
        for case, step in steps.items():
            begin = time.process_time()
            step()
            if number >= 2:  # the first ones make state and buffers
                found[case].append(time.process_time() - begin)
    print("| masters | momentum | gradients | processor's ms | / float32 |\n|---|---|---|---|---|")
    for (master, momentum, gradient), times in found.items():
        ratio = statistics.median(a / b for a, b in zip(times, found[REFERENCE], strict=True))
        name = str(gradient).removeprefix("torch.")
        print(f"| {master} | {momentum} | {name} | {1000 * statistics.median(times):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
