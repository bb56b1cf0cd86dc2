"""One optimizer step on hand-made gradients, at any parallel layout, from and to checkpoints of Megatron-Core.

TransformerEngine's forward pass needs a GPU, the optimizer does not. Weights and gradients come from checkpoints of the
whole model, made by one rank, and what a step makes of the weights goes back to one rank the same way. So it is
Megatron-Core that says which part of a weight a rank holds, and nothing of the package under test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.te import models


def save_start(folder: str, model: str) -> None:
    """On one rank: save random weights and random gradients of the whole model, as two checkpoints."""
    built = _on_one_rank(model)
    for seed, name in enumerate(("weights", "gradients")):
        _fill(built, seed)
        harness.save_weights([built], str(Path(folder) / name))


def step(
    layout: Layout,
    folder: str,
    model: str,
    result: str,
    optimizer: dict[str, Any],
    *,
    load: str = "",
    save: str = "",
) -> float:
    """One step from the saved weights, or from a saved run, with the saved gradients.

    Args:
        layout: the parallel layout.
        folder: where :func:`save_start` saved.
        model: key of :data:`tests.te.models.MODELS`.
        result: name of the checkpoint of the stepped weights, in ``folder``.
        optimizer: changes to :func:`tests.megatron.harness.optimizer_config`.
        load: name of the checkpoint of a run to go on from.
        save: name of the checkpoint of weights and optimizer that the step leaves.

    Returns:
        The norm of all gradients.
    """

    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer

    layout.initialize()
    chunks = harness.wrap([models.build_model(layout, model)], layout)
    _load(chunks[0], folder, "gradients")
    gradients = [param.detach().clone() for param in chunks[0].parameters()]
    _load(chunks[0], folder, "weights")
    run = harness.Run(layout, chunks, get_megatron_optimizer(harness.optimizer_config(layout, **optimizer), chunks))
    if load:
        harness.load_run(run, str(Path(folder) / load))
    for param, gradient in zip(chunks[0].parameters(), gradients, strict=True):
        param.main_grad.copy_(gradient)
    success, norm, _ = run.optimizer.step()
    assert success
    run.gather()
    harness.save_weights(chunks, str(Path(folder) / result))
    if save:
        harness.save_run(run, str(Path(folder) / save))
    return norm


def compare(folder: str, model: str, expected: str, result: str) -> dict[str, tuple[float, float]]:
    """On one rank: for each weight the largest update of ``expected``, and the largest difference of ``result``."""
    built = _on_one_rank(model)
    start, one, other = (_whole(built, folder, name) for name in ("weights", expected, result))
    return {name: (_distance(one[name], start[name]), _distance(one[name], other[name])) for name in start}


def _on_one_rank(model: str) -> Any:
    layout = Layout()
    layout.initialize()
    return models.build_model(layout, model)


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Different random numbers in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.1 * torch.randn(param.shape, generator=generator))


def _load(model: Any, folder: str, name: str) -> None:
    """Load a checkpoint; only TransformerEngine's FP8 state may be missing, as it is for fused down projections."""
    from megatron.core import dist_checkpointing

    bare = harness.unwrap(model)
    loaded = dist_checkpointing.load(bare.sharded_state_dict(), str(Path(folder) / name))
    keys = bare.load_state_dict(loaded, strict=False)
    assert all("_extra_state" in key for key in [*keys.missing_keys, *keys.unexpected_keys]), keys


def _whole(model: Any, folder: str, name: str) -> dict[str, torch.Tensor]:
    _load(model, folder, name)
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()
