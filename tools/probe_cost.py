"""What a measured step costs: beside a plain one of the same optimizer, in alternation in one process.

    python tools/probe_cost.py [--rounds 7] [--threads 2] [--device cpu] [--ns-dtype fp32]

Square matrices, and wide ones; 5 quintic steps. Prints the median time of a plain step, the median ratio of a step that
keeps products for the cosine, and of a measured step, ``take()`` included, to the plain steps beside them, and the mean
of all steps where one in ten is measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPES = [(16, 384, 384), (8, 1024, 4096)]
"""Number of matrices, rows, columns."""


def measure(count: int, shape: tuple[int, ...], rounds: int, device: str, ns_dtype: str) -> tuple[float, float, float]:
    """Seconds of a plain step, and the ratios of one that keeps products and of a measured one."""
    from megatron_muon import Muon
    from megatron_muon.optimizers.probe import Probe

    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(shape, generator=generator).to(device)
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
        times.append((plain, keeps / plain, measures / plain))
    plain, keeps, measures = zip(*times[1:], strict=True)  # the first one makes state, plans and vectors
    return statistics.median(plain), statistics.median(keeps), statistics.median(measures)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ns-dtype", default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| | plain step, ms | keeps products | measured | one in ten |\n|---|---|---|---|---|")
    for count, *shape in SHAPES:
        found = measure(count, tuple(shape), arguments.rounds, arguments.device, arguments.ns_dtype)
        plain, keeps, measures = found
        mean = (8 + keeps + measures) / 10
        print(f"| {count} x {shape} | {1000 * plain:.1f} | {keeps:.3f} | {measures:.3f} | {mean:.4f} |", flush=True)


if __name__ == "__main__":
    main()
