"""What ranks do with Megatron-Core: steps of a small model at several layouts, saved, resharded and loaded.

Gradients are made by hand and put where the backward pass would leave them, so that all layouts have the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import megatron_muon
from tests.megatron import harness
from tests.megatron.harness import Layout

LAYOUTS = {
    "one": Layout(local=True, overlap=False),
    "tp2": Layout(tp=2, local=True, overlap=False),
    "dp2": Layout(layer_wise=True, local=True, overlap=False),
}
"""By name: one rank; two tensor-parallel ranks; two data-parallel ranks, each of which owns some weights."""

MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96}

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save_start(folder: str) -> None:
    """On one rank: save random weights and random gradients of the whole model, as two checkpoints."""
    layout = LAYOUTS["one"]
    layout.initialize()
    chunks = harness.build_model(layout, **MODEL)
    for seed, name in enumerate(("weights", "gradients")):
        _fill(chunks, seed)
        harness.save_weights(chunks, str(Path(folder) / name))


def step(folder: str, layout_name: str, result: str, load: str = "") -> dict[str, Any]:
    """One step, from the saved weights or a saved run; weights and run are saved as ``result`` and ``result-run``.

    Returns:
        the norm of the gradients, a sum of bits of state that was loaded, and how many messages were sent from point
        to point.
    """
    layout, root = LAYOUTS[layout_name], Path(folder)
    megatron_muon.install()
    layout.initialize()
    from megatron.core.optimizer import get_megatron_optimizer

    chunks = harness.wrap(harness.build_model(layout, **MODEL), layout)
    harness.load_weights(chunks, str(root / "gradients"))
    gradients = [param.detach().clone() for param in chunks[0].parameters()]
    harness.load_weights(chunks, str(root / "weights"))
    run = harness.Run(layout, chunks, get_megatron_optimizer(harness.optimizer_config(layout), chunks))
    if load:
        harness.load_run(run, str(root / load), METADATA)
    for param, gradient in zip(chunks[0].parameters(), gradients, strict=True):
        param.main_grad.copy_(gradient)
    with mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as messages:
        success, norm, _ = run.optimizer.step()
    assert success
    run.gather()
    harness.save_weights(chunks, str(root / result))
    harness.save_run(run, str(root / f"{result}-run"), METADATA)
    return {"norm": float(norm), "messages": messages.call_count}


def compare(folder: str, expected: str, results: list[str]) -> dict[str, float]:
    """On one rank: for each result the largest difference to ``expected``, as a share of the largest update."""
    layout = LAYOUTS["one"]
    layout.initialize()
    chunks = harness.build_model(layout, **MODEL)

    def whole(name: str) -> list[torch.Tensor]:
        harness.load_weights(chunks, str(Path(folder) / name))
        return [param.detach().double().cpu() for param in chunks[0].parameters()]

    start, one = whole("weights"), whole(expected)
    found = {}
    for name in results:
        pairs = list(zip(start, one, whole(name), strict=True))
        found[name] = max(float((c - b).abs().max() / (b - a).abs().max()) for a, b, c in pairs)
    return found


def _fill(chunks: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in chunks[0].parameters():
            param.copy_(0.1 * torch.randn(param.shape, generator=generator))
