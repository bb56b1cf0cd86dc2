"""One set of weights and gradients, in the forms that different optimizers take.

``fused``
    Each weight as Megatron has it: ours, and Adam's.
``upstream``
    The same, but what Megatron-Core's Muon cannot split (gate and up; q, k and v where a shard cuts through a query
    group; stacks) as parameters of their own, so that the logical matrices are the same. ``linear_qkv`` stays fused:
    it splits that itself.
``logical``
    Each logical matrix as a parameter: for optimizers that split nothing.

Where the memory of a weight already has the form that is asked for, the forms share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_muon.errors import ConfigError
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, WHOLE, MatrixLayout
from tools.bench.cases import Case, WeightSpec
from tools.bench.ranks import Groups
from tools.splitting import split

__all__ = ["FORMS", "FUSED", "LOGICAL", "UPSTREAM", "Entry", "Matrices", "Piece", "Tensors", "pieces_of", "whole"]

FUSED, UPSTREAM, LOGICAL = "fused", "upstream", "logical"
FORMS = (FUSED, UPSTREAM, LOGICAL)

WEIGHT_DEVIATION = 0.02
"""Of random weights. Small beside an update, so that the difference of two weights is not rounded much."""


@dataclass(frozen=True)
class Matrices:
    """Which logical matrices of the whole weight a tensor holds (its part of).

    Attributes:
        block: index of the block in the weight's layout.
        numbers: of the matrices in the block; empty for all.
    """

    block: int
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A tensor that becomes a parameter.

    Attributes:
        tensor: on this rank.
        layout: its logical matrices.
        dim: the dimension of its matrices that tensor parallelism divides; None if it is whole.
        matrices: what they are, for each block of ``layout``.
        alone: whether no other tensor-parallel rank has (a part of) them.
    """

    tensor: torch.Tensor
    layout: MatrixLayout
    dim: int | None
    matrices: tuple[Matrices, ...]
    alone: bool = False


@dataclass(frozen=True)
class Entry:
    """What becomes one parameter of an optimizer.

    Attributes:
        spec: index of the weight in the case.
        weight: a :class:`Piece` of the weight; optimizers of one form update the same memory.
        grad: that of the gradient.
        expert: whether it is an expert's.
    """

    spec: int
    weight: Piece
    grad: torch.Tensor
    expert: bool

    def parameter(self) -> torch.nn.Parameter:
        """A new parameter on the entry's memory, with the attributes that Megatron-Core's have."""
        param = torch.nn.Parameter(self.weight.tensor)
        param.grad = self.grad
        dim = self.weight.dim
        attributes = {
            "tensor_model_parallel": dim is not None,
            "partition_dim": -1 if dim is None else dim + 2,
            "expert_tp": self.expert,
            LAYOUT_ATTRIBUTE: self.weight.layout,
        }
        if _is_qkv(self.weight.layout):
            attributes |= {
                "is_qkv": True,
                "qkv_split_shapes": [section.rows for section in self.weight.layout.sections],
            }
        for name, value in attributes.items():
            setattr(param, name, value)
        return param


class Tensors:
    """This rank's random weights and gradients of a case."""

    def __init__(self, case: Case, groups: Groups, device: torch.device, forms: Iterable[str]) -> None:
        """
        Args:
            case: the weights.
            groups: this rank's place.
            device: where they are to be.
            forms: those that are needed.

        Raises:
            ConfigError: if a weight cannot be given in one of the forms.
        """
        self.case, self.groups, self.device = case, groups, device
        self.entries: dict[str, list[Entry]] = {form: [] for form in forms}
        for index, spec in enumerate(case.weights):
            wholes = [self.whole(index, kind) for kind in ("weight", "gradient")]
            wholes[0].mul_(WEIGHT_DEVIATION)
            locals_ = [_local(spec, x, case.tp, groups.tp_rank) for x in wholes]
            for form, entries in self.entries.items():
                weights, grads = (
                    pieces_of(spec, local, x, form, case.tp, groups.tp_rank)
                    for local, x in zip(locals_, wholes, strict=True)
                )
                entries += [
                    Entry(index, weight, grad.tensor, spec.expert) for weight, grad in zip(weights, grads, strict=True)
                ]

    def whole(self, index: int, kind: str) -> torch.Tensor:
        """The whole weight or gradient number ``index``, the same on all ranks that share it."""
        spec = self.case.weights[index]
        copy = self.groups.ep_rank if spec.expert else 0
        return whole(spec.shape, 2 * (index * self.case.ep + copy) + (kind == "gradient"), self.device)


def whole(shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """float32, normal, from a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


def _local(spec: WeightSpec, x: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """This rank's shard, with memory of its own."""
    if spec.dim is None:
        return x
    return x.chunk(ranks, dim=spec.dim)[rank].clone(memory_format=torch.contiguous_format)


def _is_qkv(layout: MatrixLayout) -> bool:
    """Whether Megatron-Core's Muon can split it: sections of a period, each a part of one matrix."""
    return layout.kind == "qkv" and not layout.stacked and not any(section.matrix_rows for section in layout.sections)


def pieces_of(spec: WeightSpec, local: torch.Tensor, x: torch.Tensor, form: str, ranks: int, rank: int) -> list[Piece]:
    """A weight, or its gradient, in one of the forms.

    Args:
        spec: the weight.
        local: this rank's shard.
        x: the whole of it.
        form: one of :data:`FORMS`.
        ranks: of the tensor-parallel group.
        rank: in it.

    Raises:
        ConfigError: if the ranks cannot hold even parts of a logical matrix.
    """
    layout = spec.layout
    is_one_matrix = not layout.sections and not layout.stacked
    split_by_itself = form == UPSTREAM and _is_qkv(layout) and layout.fits(local.size(-2))
    if form == FUSED or is_one_matrix or split_by_itself:
        matrices = tuple(Matrices(block) for block in range(len(layout.blocks(spec.shape))))
        return [Piece(local, layout, spec.dim, matrices)]
    found = []
    for block in range(len(layout.blocks(spec.shape))):
        found += _matrices_of(spec, block, local, x, ranks, rank)
    return found


def _matrices_of(
    spec: WeightSpec, block: int, local: torch.Tensor, x: torch.Tensor, ranks: int, rank: int
) -> list[Piece]:
    """Each matrix of a block as a piece."""
    layout, dim = spec.layout, spec.dim
    heads = bool(layout.matrix_rows(block))
    numbers = _numbers(split(layout, x)[block])
    if dim is None or dim == -1 or layout.fits(local.size(-2)):
        part = split(layout, local)[block]
    else:  # shards cut through periods: give even parts of the whole matrices instead
        part = _cut(spec, split(layout, x)[block], -3 if heads else -2, ranks, rank)
    alone = dim == -2 and heads
    if alone:
        numbers = numbers.chunk(ranks, dim=-1)[rank]
    part = part.reshape(-1, *part.shape[-2:])
    return [
        Piece(matrix.contiguous(), WHOLE, None if alone else dim, (Matrices(block, (int(number),)),), alone)
        for matrix, number in zip(part, numbers.flatten(), strict=True)
    ]


def _numbers(block: torch.Tensor) -> torch.Tensor:
    """The number of each matrix of a block with any leading dimensions."""
    leading = block.shape[:-2]
    return torch.arange(max(1, leading.numel())).view(leading or (1,))


def _cut(spec: WeightSpec, block: torch.Tensor, dim: int, ranks: int, rank: int) -> torch.Tensor:
    if block.size(dim) % ranks:
        raise ConfigError(
            f"--tp {ranks}: the matrices of {spec.name} ({spec.layout.kind}) have no even parts on {ranks} ranks, and "
            f"Megatron-Core's Muon takes no others. Choose a divisor of {block.size(dim)}."
        )
    return block.chunk(ranks, dim=dim)[rank]
