"""What state on the host costs: steps beside each other in one process, and from which size copies are hidden on a GPU.

    python tools/offload_cost.py [--rounds 9] [--threads 2] [--link-gb 50] [--device h100]

Steps: 12 matrices of 512 x 512, 5 quintic steps, on the CPU, where copies take the processor's own time; medians of
the ratio to the step of the same round with state that stays. Sizes: of square matrices, by the operations of
Newton-Schulz in bfloat16, symmetric products by half, at the rate that ``plan`` has of the device, and the bytes that
go each way, in and out at the same time.
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

REMAINDER: dict[str, Any] = {"master": "remainder"}
CASES: dict[str, tuple[torch.dtype, dict[str, Any], str, float]] = {
    "float32 momentum": (torch.float32, {}, "momentum", 4),
    "float32 momentum, remainders": (torch.bfloat16, REMAINDER, "all", 4 + 2.125),
    "bf16 momentum, remainders": (torch.bfloat16, {**REMAINDER, "momentum_dtype": "bf16"}, "all", 2 + 2.125),
    "int8 momentum, remainders": (torch.bfloat16, {**REMAINDER, "momentum_dtype": "int8"}, "all", 1.016 + 2.125),
}
"""Dtype of the weights, how state is kept, what is on the host, and bytes a parameter that go each way."""


def step_of(dtype: torch.dtype, **options: Any) -> Callable[[], Any]:
    """The step of an optimizer of its own, of the same weights and gradients."""
    from megatron_muon import Muon

    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter((0.02 * torch.randn(512, 512, generator=generator)).to(dtype)) for _ in range(12)]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return Muon(params, lr=1e-3, **options).step


def ratio(rounds: int, near: Callable[[], Any], far: Callable[[], Any]) -> float:
    """Median over rounds of the time of ``far`` by that of ``near``, one after the other."""
    found = []
    for number in range(rounds + 2):
        times = []
        for step in (near, far) if number % 2 else (far, near):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        found.append(times[1] / times[0] if number % 2 else times[0] / times[1])
    return statistics.median(found[2:])  # the first ones make state and buffers


def hidden_from(each_way: float, link: float, rate: float) -> int:
    """The side of the smallest square matrices, in steps of 64, whose products take as long as their copies."""
    from megatron_muon.orthogonalize import iteration
    from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
    from megatron_muon.orthogonalize.products import TorchProducts

    class Halved(TorchProducts):
        def symmetric_flops(self, p: int, inner: int) -> int:
            return p * p * inner

    flops = Orthogonalizer(iteration("quintic", 5), torch.bfloat16, products=Halved()).flops
    return next(p for p in range(64, 1 << 16, 64) if flops(p, p) / rate >= each_way * p * p / link)


def main() -> None:
    """Print a table in Markdown."""
    from megatron_muon.planning.rates import Rates

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--link-gb", type=float, default=50.0, help="GB/s each way between GPU and host")
    parser.add_argument("--device", default="h100", help="as of plan")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rate = Rates.of(given.device).numbers["bfloat16.flops"]
    print("| on the host | bytes a parameter each way | step on the CPU / without | hidden on a GPU from |")
    print("|---|---|---|---|")
    for name, (dtype, options, offload, each_way) in CASES.items():
        steps = (step_of(dtype, **options, offload=where) for where in ("none", offload))
        side = hidden_from(each_way, given.link_gb * 1e9, rate)
        print(f"| {name} | {each_way:.2f} | {ratio(given.rounds, *steps):.2f} | {side} x {side} |", flush=True)


if __name__ == "__main__":
    main()
