"""Is the update right: each matrix against the exact polynomial, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_muon.orthogonalize.coefficients import Iteration, iteration
from megatron_muon.orthogonalize.scale import scale_factor
from tools.bench.contestants import Contestant, steps_of
from tools.bench.forms import Entry, Matrices, Tensors
from tools.bench.ranks import World
from tools.splitting import split

__all__ = ["BOUNDS", "Errors", "Reference", "WrongUpdateError", "check", "exact_update", "update_errors"]

BOUNDS = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 1e-2}
"""Greatest relative error of any matrix, by the type of the products: several times what rounding does to random ones,
far below what a wrong split, scale or coefficient does."""

EPS = 1e-7


class WrongUpdateError(RuntimeError):
    """An optimizer's update is not what it must be."""


@dataclass(frozen=True)
class Errors:
    """Relative Frobenius errors over all matrices.

    Attributes:
        worst: the greatest.
        mean: of all.
        bound: on ``worst``; None for an update that is another by design.
    """

    worst: float
    mean: float
    bound: float | None


def exact_update(x: torch.Tensor, steps: Iteration) -> torch.Tensor:
    """Newton-Schulz in float64, by the definition alone.

    Args:
        x: (batch, m, n).
        steps: of the set.

    Returns:
        (batch, m, n), float64.
    """
    y = x.double()
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp_min(EPS)
    turned = y.size(-2) > y.size(-1)
    y = y.mT if turned else y
    if steps.balanced:
        y = y / (y @ y.mT).abs().sum(-1, keepdim=True).sqrt()
    for a, b, c in steps.coefficients:
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if turned else y


class Reference:
    """Exact updates of a case's matrices, computed when first asked for.

    Attributes:
        tensors: the case's, on this rank.
    """

    def __init__(self, tensors: Tensors) -> None:
        """
        Args:
            tensors: knows the whole gradients.
        """
        self.tensors = tensors
        self._known: dict[tuple[int, str], list[torch.Tensor]] = {}

    def __call__(self, spec: int, polynomial: str, matrices: Matrices) -> torch.Tensor:
        """(matrices, m, n), float64.

        Args:
            spec: index of the weight.
            polynomial: name of the coefficients.
            matrices: of it.
        """
        if (spec, polynomial) not in self._known:
            layout, steps = self.tensors.case.weights[spec].layout, iteration(polynomial, steps_of(polynomial))
            blocks = split(layout, self.tensors.whole(spec, "gradient"))
            self._known[spec, polynomial] = [
                exact_update(block.reshape(-1, *block.shape[-2:]), steps) for block in blocks
            ]
        block = self._known[spec, polynomial][matrices.block]
        return block[list(matrices.numbers)] if matrices.numbers else block


def update_errors(
    contestant: Contestant, optimizer: torch.optim.Optimizer, entries: list[Entry], reference: Reference, world: World
) -> Errors | None:
    """Do one step with learning rate 1, without momentum and decay, and compare what it adds with the exact update.

    The weights are put back; the momentum then holds the gradients.

    Args:
        contestant: what ``optimizer`` is.
        optimizer: at its first step.
        entries: its parameters.
        reference: the exact updates.
        world: all ranks must call this.

    Returns:
        Of the matrices of all ranks; None for an optimizer that orthogonalizes nothing.
    """
    world.barrier()
    before = [entry.weight.tensor.clone() for entry in entries]
    usual = [_override(group, {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0}) for group in optimizer.param_groups]
    optimizer.step()
    for group, values in zip(optimizer.param_groups, usual, strict=True):
        group.update(values)
    found: list[float] = []
    for entry, weight in zip(entries, before, strict=True):
        if contestant.polynomial:
            found += _entry_errors(contestant, entry, weight - entry.weight.tensor, reference)
        entry.weight.tensor.copy_(weight)
    if not contestant.polynomial:
        return None
    everywhere = [error for errors in world.gather(found) for error in errors]
    worst = math.nan if any(map(math.isnan, everywhere)) else max(everywhere)
    bound = BOUNDS[contestant.dtype] if contestant.exact else None
    if bound is not None and contestant.package != "megatron-muon":
        bound += 2 * max(world.gather(_norm_error(entries, reference)))
    return Errors(worst, sum(everywhere) / len(everywhere), bound)


def check(contestant: Contestant, errors: Errors | None) -> None:
    """A step that is fast and wrong must not win.

    Raises:
        WrongUpdateError: if the worst error is above the bound.
    """
    if errors is not None and errors.bound is not None and not errors.worst <= errors.bound:
        raise WrongUpdateError(
            f"{contestant.name}: the update of a matrix is off by {errors.worst:.1e} of its size; with products in "
            f"{contestant.dtype} at most {errors.bound:.0e} is rounding"
        )


def _norm_error(entries: list[Entry], reference: Reference) -> float:
    """The greatest relative error of torch's norms of gradients, by which others divide.

    In float32 on CPUs it grows with the number of elements, to 6.5e-4 at 4096 x 4096.
    """
    found = 0.0
    for spec in {entry.spec for entry in entries}:
        for block in split(reference.tensors.case.weights[spec].layout, reference.tensors.whole(spec, "gradient")):
            for matrix in block.reshape(-1, *block.shape[-2:]):
                exact = torch.linalg.vector_norm(matrix.double())
                found = max(found, float((torch.linalg.vector_norm(matrix) / exact - 1).abs()))
    return found


def _override(group: dict[str, float], values: dict[str, float]) -> dict[str, float]:
    """Set those that the group has; returns what was there."""
    before = {name: group[name] for name in values if name in group}
    group.update({name: values[name] for name in before})
    return before


def _entry_errors(contestant: Contestant, entry: Entry, update: torch.Tensor, reference: Reference) -> list[float]:
    """Of the matrices that this rank answers for: those of every n-th weight of n tensor-parallel ranks."""
    piece, tensors = entry.weight, reference.tensors
    groups, ranks = tensors.groups, tensors.case.tp
    group = groups.expert_tp if entry.expert else groups.tp
    shards = 1
    if piece.dim is not None and group is not None:
        shards = group.size()
        parts = [torch.empty_like(update) for _ in range(shards)]
        dist.all_gather(parts, update.contiguous(), group=group)
        update = torch.cat(parts, dim=piece.dim)
    if not piece.alone and entry.spec % ranks != groups.tp_rank:
        return []
    found: list[float] = []
    for block, matrices in zip(split(piece.layout, update), piece.matrices, strict=True):
        size = [block.size(-2), block.size(-1)]
        if not contestant.exact and piece.dim is not None:  # it scales by the shard
            size[piece.dim] //= shards
        scale = scale_factor(contestant.scale_mode, *size) * contestant.extra_scale
        expected = reference(entry.spec, contestant.polynomial, matrices)
        actual = block.reshape(expected.shape).double() / scale
        errors = torch.linalg.vector_norm(actual - expected, dim=(-2, -1))
        found += (errors / torch.linalg.vector_norm(expected, dim=(-2, -1))).tolist()
    return found
