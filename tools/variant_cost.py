"""What variants cost in a step: beside plain Muon and emerging-optimizers' own, in alternation in one process.

    python tools/variant_cost.py [--rounds 9] [--threads 2]

24 matrices (12 of 512 x 512, 6 each of 1024 x 512 and 512 x 1024), float32, 5 quintic steps, on the CPU. Prints medians
of the time of ``optimizer.step()``, and of its ratio to that of plain Muon in the same round.
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

SHAPES = [(512, 512)] * 12 + [(1024, 512)] * 6 + [(512, 1024)] * 6
COMMON: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1, "fp32_matmul_prec": "highest"}
REFERENCE = "Muon"


def contestants() -> dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]]:
    """By name: ours, and emerging-optimizers' of the same rule if there is one."""
    from functools import partial

    from emerging_optimizers import orthogonalized_optimizers as upstream

    from megatron_muon import Muon
    from megatron_muon.optimizers.sphere import SpectralSphere

    theirs = upstream.AdaptiveMuon
    return {
        REFERENCE: (Muon, upstream.Muon),
        "update_norm": (partial(Muon, scale_mode="update_norm"), None),
        "spectral_norm": (partial(Muon, scale_mode="spectral_norm"), None),
        "AdaMuon": (partial(Muon, variant="adamuon"), None),
        "adamuon_eo": (
            partial(Muon, variant="adamuon_eo"),
            partial(theirs, moment2_method="adamuon"),
        ),
        "NorMuon": (partial(Muon, variant="normuon"), partial(theirs, moment2_method="normuon")),
        "NAMO": (partial(Muon, variant="namo"), partial(theirs, moment2_method="namo")),
        "PolarGrad": (partial(Muon, variant="polargrad", scale_mode="none"), upstream.PolarGrad),
        "Hyperball": (partial(Muon, variant="hyperball", scale_mode="none"), upstream.MuonHyperball),
        "MuonSphere": (partial(Muon, variant=SpectralSphere(tolerance=1.0)), None),
        "spectral sphere, tolerance 0.5": (partial(Muon, variant=SpectralSphere(tolerance=0.5)), None),
        "spectral sphere, tolerance 0.1": (partial(Muon, variant=SpectralSphere(tolerance=0.1)), None),
    }


def parameters() -> list[torch.nn.Parameter]:
    """Weights with gradients, the same for all."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by name; emerging-optimizers' under the name with a star."""
    steps: dict[str, Callable[[], Any]] = {}
    for name, (ours, theirs) in contestants().items():
        steps[name] = ours(parameters(), **COMMON).step
        if theirs is not None:
            steps[f"{name}*"] = theirs(parameters(), **COMMON).step
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if number >= 2:  # the first ones make state and buffers
                found[name].append(time.perf_counter() - begin)
    return found


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(arguments.rounds)

    def ratio(name: str) -> str:
        if name not in found:
            return ""
        return f"{statistics.median(a / b for a, b in zip(found[name], found[REFERENCE], strict=True)):.2f}"

    print("| | ms | / Muon | emerging-optimizers' / Muon |\n|---|---|---|---|")
    for name in found:
        if not name.endswith("*"):
            print(f"| {name} | {1000 * statistics.median(found[name]):.0f} | {ratio(name)} | {ratio(name + '*')} |")


if __name__ == "__main__":
    main()
