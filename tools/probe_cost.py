"""What a measured step costs: beside a plain one of the same optimizer, in alternation in one process.

    python tools/probe_cost.py [--rounds 7] [--threads 2] [--device cpu] [--ns-dtype fp32]

Square matrices, wide ones, and those of ``make train``; 5 quintic steps. Prints the median time of a plain step, the
median ratio of a step that keeps products for the cosine, and of a measured step, ``take()`` included, to the plain
steps beside them, the mean of all steps where one in ten is measured, and what both steps take beyond two plain ones.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CASES = {
    "16 x 384 x 384": [(16, 384, 384)],
    "8 x 1024 x 4096": [(8, 1024, 4096)],
    "the example's 35": [(10, 192, 192), (10, 64, 192), (10, 512, 192), (5, 192, 512)],
}
"""Number of matrices, rows, columns."""


def measure(
    shapes: list[tuple[int, int, int]], rounds: int, device: str, ns_dtype: str
) -> tuple[float, float, float, float]:
    """Seconds of a plain step, ratios of one that keeps products and of a measured one, seconds that both take more."""
    from megatron_muon import Muon
    from megatron_muon.optimizers.probe import Probe

    generator = torch.Generator().manual_seed(1)
    sizes = [size for count, *size in shapes for _ in range(count)]
    params = [torch.nn.Parameter((0.02 * torch.randn(size, generator=generator)).to(device)) for size in sizes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(device)
    optimizer = Muon(params, lr=1e-3, ns_dtype=ns_dtype)
    probe = optimizer.probe = Probe()

    def timed(is_next_due: bool, is_due: bool) -> float:
        probe.is_next_due, probe.is_due = is_next_due, is_due
        begin = time.perf_counter()
        optimizer.step()
        probe.take()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    times = []
    for _ in range(rounds + 1):
        before, keeps, measures, after = (
            timed(False, False),
            timed(True, False),
            timed(False, True),
            timed(False, False),
        )
        plain = (before + after) / 2
        times.append((plain, keeps / plain, measures / plain, keeps + measures - 2 * plain))
    plains, kept, measured, more = map(statistics.median, zip(*times[1:], strict=True))
    return plains, kept, measured, more  # without the first, which makes state, plans and vectors


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ns-dtype", default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| | plain step, ms | keeps products | measured | one in ten | more, ms |\n|---|---|---|---|---|---|")
    for name, shapes in CASES.items():
        plain, keeps, measures, more = measure(shapes, arguments.rounds, arguments.device, arguments.ns_dtype)
        ratios = f"{keeps:.3f} | {measures:.3f} | {(8 + keeps + measures) / 10:.4f}"
        print(f"| {name} | {1000 * plain:.1f} | {ratios} | {1000 * more:.1f} |", flush=True)


if __name__ == "__main__":
    main()
