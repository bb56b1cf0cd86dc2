"""Rules and weights that steps on fake CUDA are taken with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megatron_muon.choices import SCALE_MODES, SECOND_MOMENTS, VARIANTS, WEIGHT_DECAY_METHODS
from megatron_muon.optimizers.sphere import SpectralSphere
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.optimizers.stiefel_solvers import SOLVERS
from megatron_muon.orthogonalize.scale import SPECTRAL_NORM, UPDATE_NORM
from megatron_muon.routing.layout import BALLS, MSIGN, SCALAR, STIEFEL, WHOLE, Budget, MatrixLayout, Section
from tests.fake_cuda.world import World

QKV = MatrixLayout("qkv", (Section("q", 4), Section("k", 2), Section("v", 2)))
HEADS = MatrixLayout("qkv", (Section("q", 8, matrix_rows=4), Section("k", 4, matrix_rows=4), Section("v", 4)))
GATED = MatrixLayout("gdn", (Section("q", 6), Section("beta", 2, SCALAR)))
FOUR_STEPS = dataclasses.replace(WHOLE, budget=Budget(4))
GATES = MatrixLayout("gates", (Section("beta", 2, SCALAR),))

ELEMENTWISE: dict[str, dict[str, Any]] = {
    **{
        mode: {"scale_mode": mode, "hidden_size": 16}
        for mode in SCALE_MODES
        if mode not in (UPDATE_NORM, SPECTRAL_NORM)
    },
    **{method: {"weight_decay_method": method} for method in WEIGHT_DECAY_METHODS},
    "lion": {"scalar_optimizer": "lion"},
    "momentum": {"nesterov": False},
    "tensor rate": {"lr": None},
    "damped": {"damping_depth": 2.0},
}
"""Options of what is done with each element, whatever the mode of tensor parallelism is."""

MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    **{mode: (MSIGN, {"scale_mode": mode}) for mode in (UPDATE_NORM, SPECTRAL_NORM)},
    **{method: (MSIGN, {"variant": method}) for method in SECOND_MOMENTS},
    **{variant: (MSIGN, {"variant": variant, "scale_mode": "none"}) for variant in VARIANTS if variant != "none"},
    **{name: (MSIGN, {"coefficient_type": name}) for name in ("cubic5", "turbo_muon")},
    "sphere": (MSIGN, {"variant": SpectralSphere(tolerance=0.5)}),
    "MuonSphere": (MSIGN, {"variant": SpectralSphere(tolerance=1.0)}),
    **{direction: (direction, {}) for direction in BALLS},
}
"""Direction and options of what measures whole matrices, of which ranks have parts."""

SOLVED: dict[str, tuple[str, dict[str, Any]]] = {
    solver: (STIEFEL, {"variant": StiefelMuon(solver, 2 if solver == "fixed_point" else 1)}) for solver in SOLVERS
}
"""Direction and options of weights on the manifold."""

NUMBERS = (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "auto"), ("fp16", "auto"), ("fp16", "fp32"))
"""Types of numbers of the iteration, and between ranks."""

EVERYTHING = (
    ((16, 12), 1, WHOLE),
    ((16, 12), 1, FOUR_STEPS),
    ((12, 16), 0, WHOLE),
    ((16, 12), 0, QKV),
    ((20, 12), 0, QKV),
    ((32, 12), 1, HEADS),
    ((2, 16, 12), 1, WHOLE.stack()),
    ((16, 12), 0, GATED),
    ((8, 12), 0, GATES),
    ((12, 20), None, WHOLE),
)
"""Shards of rows and columns, wide and tall, of whole periods and of parts of them, a stack, gates; and a whole weight:
shape, ``partition_dim``, layout."""

FEW = (((16, 12), 1, WHOLE), ((12, 16), 0, FOUR_STEPS), ((20, 12), 0, QKV), ((2, 16, 12), 1, WHOLE.stack()))
"""Of these one of each kind."""

Shards = tuple[tuple[tuple[int, ...], int | None, MatrixLayout], ...]


def weights(world: World, shards: Shards, direction: str = MSIGN, **options: Any) -> list[torch.nn.Parameter]:
    """Parameters of a world, with gradients; what is not orthogonalized has no budget."""
    changes = {} if direction == MSIGN else {"direction": direction, "budget": None}
    return [
        world.parameter(*shape, dim=dim, layout=dataclasses.replace(layout, **changes), **options)
        for shape, dim, layout in shards
    ]
