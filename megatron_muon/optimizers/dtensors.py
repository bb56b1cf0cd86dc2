"""Weights that are DTensors: of FSDP2 (``fully_shard``), of tensor parallelism (``parallelize_module``), or of both.

A step works on local tensors. Within :func:`on_shards` an optimizer has this rank's part in place of each DTensor, with
its gradient and state; a :class:`megatron_muon.engine.placements.Division` on it tells the engine where it lies, and
who has the other parts. Outside, weights and state are DTensors, so that ``torch.distributed.checkpoint`` saves and
reshards both.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate

from megatron_muon.choices import AUTO_STEPS
from megatron_muon.engine.modes import BLOCKWISE
from megatron_muon.engine.placements import Division
from megatron_muon.errors import ConfigError, sizes
from megatron_muon.optimizers.engines import DIVISION_ATTRIBUTE, Engines
from megatron_muon.optimizers.groups import name_of
from megatron_muon.optimizers.shard_layout import ShardLayout
from megatron_muon.orthogonalize.scale import SPECTRAL_NORM
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, layout_of

_WHOLE_LAYOUT = "muon_whole_layout"
"""Attribute of local tensors: the layout of the whole weight from which their own was made."""


@contextlib.contextmanager
def on_shards(optimizer: Any) -> Iterator[None]:
    """Within, weights, gradients and state of a :class:`megatron_muon.Muon` are this rank's parts of its DTensors.

    Nothing happens without DTensors, and within another such context.
    """
    groups, state = optimizer.param_groups, optimizer.state
    wholes: dict[int, list[Any]] = {
        number: group["params"]
        for number, group in enumerate(groups)
        if [1 for param in group["params"] if isinstance(param, DTensor)]  # any() calls for each weight
    }
    if not wholes:
        yield
        return
    weights: list[Any] = [weight for params in wholes.values() for weight in params if isinstance(weight, DTensor)]
    local_of = {weight: local(weight, optimizer.engines) for weight in weights}
    kept: dict[torch.Tensor, dict[str, tuple[Any, Any]]] = {}  # as it is in the state, and this rank's part
    for weight, its in local_of.items():
        if weight in state:
            kept[weight] = {name: (value, _local_state(weight, value)) for name, value in state[weight].items()}
        its.grad = _local_grad(weight)
    optimizer.state = defaultdict(dict, {param: its for param, its in state.items() if param not in local_of})
    optimizer.state |= {local_of[weight]: {name: own for name, (_, own) in its.items()} for weight, its in kept.items()}
    for number, params in wholes.items():
        groups[number]["params"] = [local_of.get(param, param) for param in params]
    try:
        yield
    finally:
        for number, params in wholes.items():
            groups[number]["params"] = params
        inner, optimizer.state = optimizer.state, state
        whole_of = {its: weight for weight, its in local_of.items()}
        state.clear()
        for param, its in inner.items():
            weight = whole_of.get(param)
            state[param if weight is None else weight] = (
                its if weight is None else _wrapped(optimizer, weight, its, kept.get(weight, {}))
            )
        for its in local_of.values():
            its.grad = None


@torch.no_grad()
def local(weight: DTensor, engines: Engines) -> torch.Tensor:
    """This rank's part of a weight: the tensor that the DTensor has, with the weight's attributes and its division."""
    own, layout = weight.to_local(), layout_of(weight)
    attributes = vars(own)
    attributes[DIVISION_ATTRIBUTE] = engines.divisions.of(weight)
    attributes.update((name, value) for name, value in vars(weight).items() if name != LAYOUT_ATTRIBUTE)
    if attributes.get(_WHOLE_LAYOUT) is not layout:  # written anew, or not yet looked at
        attributes[_WHOLE_LAYOUT] = layout
        first, _ = attributes[DIVISION_ATTRIBUTE].piece.rows
        attributes[LAYOUT_ATTRIBUTE] = ShardLayout.of(layout, first) if layout.has_scalar_rows else layout
    return own


@torch.no_grad()
def _local_grad(weight: DTensor) -> torch.Tensor | None:
    """This rank's part of a gradient, which tensor parallelism may have left otherwise distributed than the weight."""
    grad = weight.grad
    if grad is None:
        return None
    if not isinstance(grad, DTensor):
        raise ConfigError(f"the gradient of a DTensor of {sizes(weight.shape)} is no DTensor: distribute it alike.")
    if grad.placements != weight.placements:
        grad = grad.redistribute(weight.device_mesh, weight.placements)
    return _there(grad.to_local())


def _there(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that a collective may still be filling, as torch keeps it: wait for it."""
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


@torch.no_grad()
def _local_state(weight: DTensor, value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    placements = _placements(weight, value.size(-1) == 1)
    if value.placements != placements:
        value = value.redistribute(weight.device_mesh, placements)
    return _there(value.to_local())


def _placements(weight: DTensor, of_rows: bool) -> tuple[Any, ...]:
    """The placements of state: the weight's, but for that with one number a row, which all parts of a row have."""
    last = weight.dim() - 1
    return tuple(
        Replicate() if of_rows and getattr(its, "dim", None) in (last, -1) else its for its in weight.placements
    )


@torch.no_grad()
def _wrapped(
    optimizer: Any, weight: DTensor, its: dict[str, Any], before: dict[str, tuple[Any, Any]]
) -> dict[str, Any]:
    """State as others see it: DTensors, but for what is no tensor."""
    found = {}
    for name, value in its.items():
        known, part = before.get(name, (None, None))
        if part is value:
            found[name] = known
        elif not isinstance(value, torch.Tensor):
            found[name] = value
        else:
            found[name] = _as_dtensor(weight, value)
            optimizer.versions.follow(value, found[name].to_local())
    return found


def _as_dtensor(weight: DTensor, value: torch.Tensor) -> DTensor:
    of_rows = value.size(-1) == 1 and weight.size(-1) > 1 and value.shape != weight.to_local().shape
    columns = value.size(-1) if value.size(-1) != weight.to_local().size(-1) or of_rows else weight.size(-1)
    shape = torch.Size((*weight.shape[:-1], columns))
    stride = torch.empty(shape, device="meta").stride()
    placements = _placements(weight, of_rows)
    return DTensor.from_local(value, weight.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def check(optimizer: Any, group: dict[str, Any]) -> None:
    """Refuse DTensors of a param group that cannot be updated; on all ranks alike, before anything is sent.

    Raises:
        ConfigError: naming the weight and the way out.
    """
    config = optimizer.config
    for number, weight in enumerate(group["params"]):
        if not isinstance(weight, DTensor):
            continue
        name = name_of(group, number)
        for problem in _problems(config, weight):
            raise ConfigError(f"{name} is a DTensor: {problem}")
        division: Division = optimizer.engines.divisions.of(weight, name)
        shard, scale_mode = division.shard, group.get("scale_mode", config.scale_mode)
        if shard is not None and shard.is_grid and (scale_mode == SPECTRAL_NORM or not optimizer.variant.lends):
            raise ConfigError(
                f"{name} is a DTensor whose rows and columns are divided, with scale_mode {scale_mode!r} of "
                f"{optimizer.variant.name}, which finds singular vectors of what is divided along one side alone. "
                "Use another scale_mode or variant, or divide it by rows alone."
            )
        divides = shard is not None and shard.dim == -1
        if divides and (config.master == "remainder" or config.momentum_dtype == "int8"):
            raise ConfigError(
                f"{name} is a DTensor whose columns are divided, with master {config.master} and momentum_dtype "
                f"{config.momentum_dtype}, which go by blocks of columns. Use "
                "master='fp32', and momentum_dtype 'fp32' or 'bf16'."
            )


def _problems(config: Any, weight: DTensor) -> Iterator[str]:
    if config.tp_mode == BLOCKWISE or config.blockwise_period > 1:
        yield (
            "tp_mode='blockwise' and blockwise_period take each of its shards for a matrix of its own. Leave them "
            "away: updates are those of whole matrices."
        )
    if config.offload != "none":
        yield f"offload={config.offload!r} moves plain tensors. Use fully_shard's CPUOffloadPolicy, or offload='none'."
    budget = layout_of(weight).budget
    if budget is not None and budget.steps == AUTO_STEPS:
        yield "its number of Newton-Schulz steps cannot be measured (steps:auto): give a number."
