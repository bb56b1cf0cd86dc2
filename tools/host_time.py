"""What a step costs the host for each logical matrix: ``python -m tools.host_time [--only NAME] [--steps 15]``.

Steps on matrices so small that their arithmetic is nothing, cut into as many chunks as matrices of 768 x 2048 are on a
GPU (256 MiB of float32 at once, 42 matrices). Prints microseconds of processor time for each logical matrix, the median
over steps, on one thread; the products and other operations of a chunk are in it, as calls that the host makes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_muon import Muon
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, WHOLE, MatrixLayout, Section

ROWS, COLUMNS = 4, 8
MATRICES = 2304
CHUNK = (256 << 20) // (4 * 768 * 2048)
"""Matrices at once."""

QKV = MatrixLayout("qkv", (Section("q", 2 * ROWS), Section("k", ROWS), Section("v", ROWS)))
GLU = MatrixLayout("glu", (Section("gate", ROWS), Section("up", ROWS)))

LAYOUTS: dict[str, tuple[MatrixLayout, tuple[int, ...], int]] = {
    "whole": (WHOLE, (ROWS, COLUMNS), 1),
    "qkv": (QKV, (8 * ROWS, COLUMNS), 3),
    "glu": (GLU, (2 * ROWS, COLUMNS), 2),
    "experts": (WHOLE.stack(), (16, ROWS, COLUMNS), 16),
    "glu experts": (GLU.stack(), (16, 2 * ROWS, COLUMNS), 32),
}
"""Layout and shape of a weight, and how many logical matrices it has."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"nesterov": True},
    "l2": {"weight_decay_method": "l2"},
    "cautious": {"weight_decay_method": "cautious"},
    "update_norm": {"scale_mode": "update_norm"},
    "spectral_norm": {"scale_mode": "spectral_norm"},
    "polargrad": {"variant": "polargrad", "scale_mode": "none"},
    "hyperball": {"variant": "hyperball", "scale_mode": "none"},
    "normuon": {"variant": "normuon"},
    "adamuon": {"variant": "adamuon"},
    "namo": {"variant": "namo"},
    "spectral_sphere": {"variant": "spectral_sphere"},
}
"""Options of :class:`megatron_muon.Muon`."""


def weights(name: str, matrices: int = MATRICES) -> list[torch.nn.Parameter]:
    """Weights of one layout with gradients, so many that they have about ``matrices`` logical matrices."""
    layout, shape, each = LAYOUTS[name]
    found = [torch.nn.Parameter(torch.randn(shape)) for _ in range(-(-matrices // each))]
    for param in found:
        setattr(param, LAYOUT_ATTRIBUTE, layout)
        param.grad = torch.randn(shape)
    return found


def optimizer_of(variant: str, layout: str, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """With chunks of :data:`CHUNK` matrices."""
    shape, each = LAYOUTS[layout][1:]
    elements = torch.Size(shape).numel() / each
    return Muon(params, **VARIANTS[variant], chunk_mb=CHUNK * elements * 4 / (1 << 20), fp32_matmul_prec="highest")


def seconds(step: Callable[[], Any], steps: int) -> float:
    """Processor time of one step: the median."""
    found = []
    for _ in range(steps + 2):
        begin = time.thread_time()
        step()
        found.append(time.thread_time() - begin)
    return statistics.median(found[2:])  # the first ones make plans and state


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--only", choices=VARIANTS, help="one variant")
    parser.add_argument("--layout", choices=LAYOUTS, help="one layout")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layouts = [arguments.layout] if arguments.layout else list(LAYOUTS)
    print(f"| us / matrix | {' | '.join(layouts)} |\n|---|{'---|' * len(layouts)}")
    for variant in [arguments.only] if arguments.only else VARIANTS:
        row = []
        for layout in layouts:
            params = weights(layout)
            optimizer = optimizer_of(variant, layout, params)
            row.append(1e6 * seconds(optimizer.step, arguments.steps) / (len(params) * LAYOUTS[layout][2]))
        print(f"| {variant} | {' | '.join(f'{each:.1f}' for each in row)} |", flush=True)


if __name__ == "__main__":
    main()
