"""The stages of a step at which variants of Muon differ, and what each is given.

A step of :class:`megatron_muon.optimizers.muon.Muon` goes through

* P1 gradient, momentum, and their Nesterov mix u;
* P2 :meth:`Variant.transform`: what is done to u before it is orthogonalized (elementwise);
* P3 the direction O: Newton-Schulz of whole logical matrices, by the engine;
* P4 :meth:`Variant.adapt`: second moments on O;
* P5 the size of the update: scale mode, or its measured RMS;
* P6 weight decay, P7 the addition, and :meth:`Variant.retract`: back to where weights must lie;
* P8 hooks after the step (QK-clip).

A variant is a subclass of :class:`Variant`. It sees pieces of matrices, as they lie on this rank, and gets norms and
means of whole matrices by asking :class:`Matrices`, which adds up what tensor-parallel ranks hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from megatron_muon.choices import VARIANTS
from megatron_muon.config import MuonConfig
from megatron_muon.engine.callbacks import Part, Reduce
from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers.param_step import ParamStep
from megatron_muon.routing.blocks import BlockRange
from megatron_muon.routing.layout import BALLS, MSIGN

__all__ = ["Matrices", "Update", "Variant", "Work", "divided", "is_some", "signs_"]


@dataclass(frozen=True)
class Update:
    """Some matrices of one block of one weight, in a step.

    Attributes:
        param: the weight (this rank's shard), as the last step left it.
        state: of the weight.
        grad: of the weight (this rank's shard).
        momentum: its momentum buffer.
        nesterov: weight of the momentum in Nesterov's mix with the gradient; 1 if the momentum is taken as it is.
        piece: where the matrices lie in tensors of the weight's shape.
        rows: m of each whole logical matrix.
        columns: n of each.
        divides_columns: whether tensor parallelism divides the columns of the matrices (their rows otherwise, or
            nothing: then there is nothing to add up).
        first_column: number of this rank's first column in the whole matrices.
        direction: (matrices, rows on this rank, columns on this rank), float32 or wider: O. Before there is one
            (:meth:`megatron_muon.engine.step.StepEngine.visit`), of that shape and dtype, but a single element in
            memory: only to be read from, and without meaning.
    """

    param: torch.Tensor
    state: dict[str, Any]
    grad: torch.Tensor
    momentum: torch.Tensor
    nesterov: float
    piece: BlockRange
    rows: int
    columns: int
    divides_columns: bool
    first_column: int
    direction: torch.Tensor

    def mix(self) -> torch.Tensor:
        """u: what was orthogonalized, as a new batch."""
        mixed = self.batch_of(self.momentum)
        if self.nesterov != 1.0:
            for grad, momentum in self.pairs(self.grad, mixed):
                torch.lerp(grad.to(mixed.dtype), momentum, self.nesterov, out=momentum)
        return mixed

    def pairs(self, tensor: torch.Tensor, batch: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of equal shapes of a tensor of the weight's shape (or with one column) and of a batch like it."""
        return self.piece.pairs(tensor, batch)

    def batch_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new batch with what these matrices have in a tensor of the weight's shape, or with one column."""
        columns = self.direction.size(-1) if tensor.size(-1) > 1 or self.direction.size(-1) == 1 else 1
        batch = self.direction.new_empty((*self.direction.shape[:-1], columns))
        for source, target in self.pairs(tensor, batch):
            target.copy_(source)
        return batch


class Matrices:
    """Sums over whole matrices of a list of updates: one collective for each call, for all of them."""

    def __init__(self, updates: Sequence[Update], reduce: Reduce) -> None:
        self.updates = updates
        self._reduce = reduce

    def sums(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sum of each matrix of each batch.

        Args:
            tensors: (matrices, rows, columns) for each update, on this rank.

        Returns:
            (matrices, 1, 1) for each, over the whole matrices.
        """
        return self._add_up([tensor.sum(dim=(-2, -1), keepdim=True) for tensor in tensors])

    def row_sums(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sum of each row of each matrix: (matrices, rows on this rank, 1) for each update."""
        return self._over_columns([tensor.sum(dim=-1, keepdim=True) for tensor in tensors])

    def column_sums(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sum of each column of each matrix: (matrices, 1, columns on this rank) for each update."""
        return self._over_rows([tensor.sum(dim=-2, keepdim=True) for tensor in tensors])

    def row_squares(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sum of the squares of each row, as :meth:`row_sums`, in float64, without a copy of the tensors."""
        return self._over_columns([_squares(tensor, -1) for tensor in tensors])

    def column_squares(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sum of the squares of each column, as :meth:`column_sums`, in float64, without a copy."""
        return self._over_rows([_squares(tensor, -2) for tensor in tensors])

    def row_products(self, tensors: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """W v: (matrices, rows on this rank, 1) from (matrices, columns on this rank, 1), for each update."""
        return self._over_columns([tensor @ vector for tensor, vector in zip(tensors, vectors, strict=True)])

    def column_products(self, tensors: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """W^T u: (matrices, columns on this rank, 1) from (matrices, rows on this rank, 1), for each update."""
        return self._over_rows([tensor.mT @ vector for tensor, vector in zip(tensors, vectors, strict=True)])

    def norms_over_rows(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The norm of vectors with an entry for each row, (matrices, rows on this rank, 1): (matrices, 1, 1)."""
        squares = [vector.square().sum(dim=-2, keepdim=True) for vector in vectors]
        return [total.sqrt() for total in self._over_rows(squares)]

    def norms_over_columns(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The norm of vectors with an entry for each column, (matrices, columns on this rank, 1): (matrices, 1, 1)."""
        squares = [vector.square().sum(dim=-2, keepdim=True) for vector in vectors]
        return [total.sqrt() for total in self._over_columns(squares)]

    def _over_columns(self, partial: list[torch.Tensor]) -> list[torch.Tensor]:
        """Complete sums over columns: where ranks have all columns, each has the whole sum."""
        return self._add_up_some(partial, [update.divides_columns for update in self.updates])

    def _over_rows(self, partial: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._add_up_some(partial, [not update.divides_columns for update in self.updates])

    def _add_up_some(self, partial: list[torch.Tensor], divided: Sequence[bool]) -> list[torch.Tensor]:
        indices = [index for index, is_divided in enumerate(divided) if is_divided]
        for index, total in zip(indices, self._add_up([partial[index] for index in indices]), strict=True):
            partial[index] = total
        return partial

    def norms(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The Frobenius norm of each matrix: (matrices, 1, 1) for each update."""
        totals = self._add_up([_squares(tensor, -2, -1) for tensor in tensors])
        return [total.sqrt_().to(tensor.dtype) for total, tensor in zip(totals, tensors, strict=True)]

    def _add_up(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        if not parts:
            return []
        total = self._reduce(torch.cat([part.reshape(-1) for part in parts]))
        sizes = [part.numel() for part in parts]
        return [chunk.view(part.shape) for chunk, part in zip(total.split(sizes), parts, strict=True)]


def is_some(norm: torch.Tensor) -> torch.Tensor:
    """Where a norm counts as one: not where the squares that it is the root of have lost digits, or vanished."""
    return ~(norm <= 10.0 * torch.finfo(norm.dtype).tiny ** 0.5)  # NaN counts: it must show


def divided(tensor: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """``tensor / norm``, and zeros where there is next to no norm: what has no direction is not blown up."""
    return tensor * torch.where(is_some(norm), 1.0 / norm, torch.zeros_like(norm))


def signs_(tensor: torch.Tensor) -> torch.Tensor:
    """The sign of each element, in place and without a copy; NaN stays NaN, of which ``sign_`` makes 0."""
    largest = torch.finfo(tensor.dtype).max
    # Twice, so that the smallest number there is comes to 1, too.
    return tensor.mul_(largest).mul_(largest).clamp_(-1.0, 1.0)


def _squares(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """The sum of the squares, in float64: those of gradients of 1e20 have no place in float32."""
    # On CPUs torch makes a copy in float64: of some matrices, rows or columns at a time.
    kept = -3 if len(dims) > 1 else -3 - dims[0]
    each = tensor.size(kept) if tensor.is_cuda else (tensor.size(kept) << 20) // max(1, tensor.numel())
    parts = tensor.split(max(1, each), dim=kept)
    norms = [torch.linalg.vector_norm(part, dim=dims, keepdim=True, dtype=torch.float64) for part in parts]
    return torch.cat(norms, dim=kept).square_()


def init_rows(param: torch.Tensor, state: dict[str, Any], *names: str) -> None:
    """Create what is missing of state that has one number for each row of a weight; 0: not yet.

    Numbers of a whole matrix are repeated in each of its rows, so that they are saved and resharded with them.
    """
    for name in names:
        if name not in state:
            state[name] = param.new_zeros((*param.shape[:-1], 1))


class Work(Protocol):
    """The update of all matrices of one direction, see :class:`megatron_muon.optimizers.step.EngineStep`."""

    engine: StepEngine
    direction: str
    weights: Mapping[int, ParamStep]

    def run(self) -> None:
        """As plain Muon does it, with the other hooks of the variant."""

    def read(self, parts: list[Part], slots: list[torch.Tensor]) -> None:
        """See :data:`megatron_muon.engine.callbacks.Read`: packs u, after :meth:`Variant.transform`."""

    def matrices(self, parts: list[Part], directions: list[torch.Tensor], reduce: Reduce) -> Matrices:
        """What variants see of a chunk, in a :data:`megatron_muon.engine.callbacks.Write`."""

    def iterations(self, matrices: Matrices, tensors: Sequence[torch.Tensor], state: str, usual: int) -> int:
        """Of power iterations, see :meth:`megatron_muon.optimizers.power.WarmStarts.iterations`."""


class Variant:
    """Plain Muon, and the base of all that differs from it: a variant overrides what it does otherwise.

    Its options are arguments of its constructor, kept as attributes of the same names. An object serves one optimizer.
    """

    name = "muon"
    """In the registry, and in checkpoints: state of another variant is not taken for its own."""

    optimizer = "muon"
    """The value of Megatron's ``--optimizer`` that builds it."""

    flags: ClassVar[Mapping[str, str]] = {}
    """Its options, each with the setting that gives it (``muon_sphere_radius``)."""

    decays = True
    """Whether weight decay makes sense: on a sphere it would be undone."""

    scales = True
    """Whether the scale mode acts on its updates, and keeps state for them."""

    lends = True
    """Whether other data-parallel ranks may orthogonalize for it: once for each matrix, knowing nothing else."""

    directions: tuple[str, ...] = (MSIGN, *BALLS)
    """The kinds of updates that it has, see :class:`megatron_muon.routing.layout.MatrixLayout`."""

    watched: tuple[str, ...] = ()
    """State that was found from the weights: it is found anew once somebody else has written to it or to them."""

    @property
    def adapts(self) -> bool:
        """Whether :meth:`adapt` does anything: plain Muon adds directions without a copy."""
        return type(self).adapt is not Variant.adapt

    @property
    def retracts(self) -> bool:
        """Whether :meth:`retract` does anything."""
        return type(self).retract is not Variant.retract

    @property
    def settings(self) -> dict[str, Any]:
        """What the command line would say: what does not go together is looked up by it."""
        own = {setting: getattr(self, option) for option, setting in self.flags.items()}
        return {"optimizer": self.optimizer, "muon_variant": self.name if self.name in VARIANTS else "none", **own}

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """What checkpoints tell of its options, so that changes can be told."""
        return {}

    def check(self, config: MuonConfig) -> None:
        """Refuse options of the optimizer, or of one of its param groups, that do not go with it.

        Raises:
            ConfigError: naming option, value and way out.
        """

    def notes(self, params: Sequence[torch.Tensor]) -> list[str]:
        """What the report says of a rank's weights, in lines."""
        return []

    def forget(self) -> None:
        """Take nothing for granted of what is kept beside the state: other weights, or other state, have come."""

    def begin_step(self) -> None:
        """Called before a step changes anything."""

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """Create what the variant keeps of a weight, where it is missing.

        Tensors of the weight's shape, or with 1 in place of rows or columns, are saved and resharded like the weight.
        """

    def update(self, work: Work) -> None:
        """Carry out the update of all matrices of one direction: by :meth:`Work.run`, which calls what is below.

        A variant that needs several passes over its matrices, or another computation, does it here with the engine,
        and leaves other directions (``work.direction``) to :meth:`Work.run`.
        """
        work.run()

    def transform(self, batches: Sequence[torch.Tensor]) -> None:
        """P2, in place, on momentum that is packed to be orthogonalized."""

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """P4: directions to be added to the weights, before their scale.

        Args:
            matrices: the updates; ``direction`` may be changed in place.

        Returns:
            one tensor of its direction's shape for each update.
        """
        return [update.direction for update in matrices.updates]

    def retract(self, matrices: Matrices) -> None:
        """P7, after the addition: change the weights (``param`` of each update) in place."""
