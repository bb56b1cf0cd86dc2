"""Batches of matrices in a step, whatever weights they are of, with sums and norms of whole logical matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_muon.engine.callbacks import Reduce
from megatron_muon.engine.shards import Shard
from megatron_muon.engine.slices import Slices, Tensors
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.forms import PLAIN
from megatron_muon.optimizers.handled import STEP, HostReads
from megatron_muon.optimizers.param_step import Cut, ParamStep, Weights, by_param_group, gradients
from megatron_muon.optimizers.precision import own_dtype
from megatron_muon.optimizers.rates import Options, moving
from megatron_muon.optimizers.storage import Kept, at_once, opened_in_turn
from megatron_muon.orthogonalize.kernels.elementwise import Rate, add_
from megatron_muon.routing.blocks import BlockRange, block_rows_before

__all__ = ["Matrices", "Update", "divide_", "is_nonzero", "matrices_of", "row_norms", "signs_"]

ShardOf = Callable[[torch.Tensor], Shard | None]


@dataclass(frozen=True)
class Update:
    """Matrices of one shape in a step, side by side: of one weight, or of several of one param group.

    Attributes:
        weights: the weights that they belong to.
        slices: which matrices of each weight they are, and where they lie in tensors of its shape.
        rows: m of each whole logical matrix.
        columns: n of each.
        divides_columns: whether tensor parallelism divides the columns of the matrices (their rows otherwise, or
            nothing: then there is nothing to add up).
        first_column: number of this rank's first column in the whole matrices.
        rank: number of this rank among them.
        first_row: number of this rank's first row, where ranks divide both rows and columns; None elsewhere.
        direction: (matrices, rows on this rank, columns on this rank), float32 or wider: O, free to be changed in
            place. Before there is one (:meth:`megatron_muon.engine.step.StepEngine.visit`), of that shape and dtype,
            but a single element in memory: only to be read from, and without meaning.
        ranks: how many ranks have parts of the matrices: 1 where each is whole on its rank.
    """

    weights: Sequence[ParamStep]
    slices: Slices
    rows: int
    columns: int
    divides_columns: bool
    first_column: int
    direction: torch.Tensor
    group: dist.ProcessGroup | None
    first_row: int | None = None

    @property
    def options(self) -> Options:
        """The options of the weights' param group in this step."""
        return self.weights[0].options

    @property
    def step(self) -> int:
        """Number of the step, from 1: with a step that depends on it there is no CUDA graph of the step."""
        HostReads.note("the number of the step")
        return int(self.weights[0].group[STEP])

    @property
    def ranks(self) -> int:
        """How many ranks have parts of the matrices."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This rank's number among them."""
        return 0 if self.group is None else self.group.rank()

    @property
    def divides_shorter(self) -> bool:
        """Whether tensor parallelism divides the shorter side, if any; of a square matrix that is its rows."""
        return self.divides_columns != (self.rows <= self.columns)

    @property
    def keys(self) -> list[tuple[torch.Tensor, BlockRange]]:
        """What tells the matrices of one weight's block from all others."""
        return [(weight.param, its) for weight, its in zip(self.weights, self.slices.ranges, strict=True)]

    @property
    def params(self) -> list[torch.Tensor]:
        """The weights (this rank's shards), as the last step left them.

        Raises:
            ConfigError: if the optimizer's weights are others: theirs with all bits (``master="remainder"``).
        """
        if any(weight.master.form is not PLAIN for weight in self.weights):
            raise ConfigError(
                "a variant that reads or changes `params` with master remainder: these weights are rounded. Use "
                "masters(), add(), multiply() and keep() of the update, or master fp32."
            )
        return [weight.param for weight in self.weights]

    def named(self, name: str) -> list[torch.Tensor]:
        """The state of this name of each weight."""
        return [weight.state[name] for weight in self.weights]

    def pairs(self, tensors: Sequence[torch.Tensor], batch: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Views of tensors of the weights' shapes (or with one column), and of a batch: alike but for columns."""
        return self.slices.pairs(tensors, batch)

    def gather(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """A new batch with what these matrices have in tensors of the weights' shapes, or with one column."""
        first = self.slices.ranges[0].layout.seen(tensors[0])
        columns = self.direction.size(-1) if first.size(-1) > 1 or self.direction.size(-1) == 1 else 1
        batch = self.direction.new_empty((*self.direction.shape[:-1], columns))
        sources, targets = self.pairs(tensors, batch)
        if targets:
            torch._foreach_copy_(targets, sources)
        return batch

    def store(self, tensors: Sequence[torch.Tensor], batch: torch.Tensor) -> None:
        """Write a batch (or one number a matrix, for all of its rows) back to where :meth:`gather` reads it."""
        batch = batch.expand(-1, self.direction.size(-2), -1)
        targets, sources = self.pairs(tensors, batch)
        if targets:
            torch._foreach_copy_(targets, sources)

    def mix(self) -> torch.Tensor:
        """u: what was orthogonalized, as a new batch."""
        momenta, share = [weight.momentum for weight in self.weights], self.options.nesterov
        if share == 1.0:
            return self._numbers(momenta)
        mixed = self.direction.new_empty(self.direction.shape)
        for grads, slots in gradients(self.weights, self.slices, mixed):
            if grads:
                torch._foreach_copy_(slots, grads)
        cut = Cut(self.slices, mixed)
        for numbers, take in opened_in_turn(momenta, cut, writes=False):
            if numbers and numbers[0].dtype != mixed.dtype:
                numbers = [each.to(mixed.dtype) for each in numbers]
            if numbers:
                torch._foreach_lerp_(take(cut.slots), numbers, share)
        return mixed

    def masters(self) -> torch.Tensor:
        """The weights as the optimizer has them, as a new batch."""
        return self._numbers([weight.master for weight in self.weights])

    def master_norms(self) -> torch.Tensor:
        """Norms of their rows, on this rank: (matrices, rows, 1), without a copy of plain weights."""
        found = self.direction.new_empty((*self.direction.shape[:-1], 1))
        cut = Cut(self.slices, found)
        for numbers, take in opened_in_turn([weight.master for weight in self.weights], cut, writes=False):
            for tensor, norms in zip(numbers, take(cut.slots), strict=True):
                row_norms(tensor, out=norms)
        return found

    def add(self, batch: torch.Tensor, rate: Rate) -> None:
        """Add a batch, times a rate, to the weights; nothing at rate 0."""
        if self.options.is_still:
            return
        cut = Cut(self.slices, batch)
        for numbers, take in opened_in_turn([weight.master for weight in self.weights], cut):
            if numbers:
                add_(numbers, take(cut.slots), rate)

    def keep(self, batch: torch.Tensor) -> None:
        """Make a batch the weights; not at rate 0."""
        if self.options.is_still:
            return
        if isinstance(self.options.lr, torch.Tensor):
            batch = moving(self.options.lr, batch, self.masters())
        cut = Cut(self.slices, batch)
        for numbers, take in opened_in_turn([weight.master for weight in self.weights], cut):
            if numbers:
                torch._foreach_copy_(numbers, take(cut.slots))

    def _numbers(self, kept: Sequence[Kept]) -> torch.Tensor:
        batch = self.direction.new_empty(self.direction.shape)
        cut = Cut(self.slices, batch)
        for numbers, take in opened_in_turn(kept, cut, writes=False):
            if numbers:
                torch._foreach_copy_(take(cut.slots), numbers)
        return batch

    def gradient_norms(self) -> torch.Tensor:
        """Norms of the rows of gradients with the decay of method ``l2``, on this rank: (matrices, rows, 1), float64.

        Nothing of the size of a gradient is copied.
        """
        found = self.direction.new_empty((*self.direction.shape[:-1], 1), dtype=torch.float64)
        for grads, slots in gradients(self.weights, self.slices, found):
            for tensor, norms in zip(grads, slots, strict=True):
                row_norms(tensor, wide=True, out=norms)
        return found

    def multiply(self, factor: torch.Tensor) -> None:
        """Multiply the weights in place by a factor for each matrix, (matrices, 1, 1); not at rate 0."""
        if self.options.is_still:
            return
        if isinstance(self.options.lr, torch.Tensor):
            factor = moving(self.options.lr, factor, torch.ones_like(factor))
        cut = Cut(self.slices, factor.expand(-1, self.direction.size(-2), 1))
        for numbers, take in opened_in_turn([weight.master for weight in self.weights], cut):
            if numbers:
                torch._foreach_mul_(numbers, take(cut.slots))


class Matrices:
    """Sums over whole matrices of a list of updates: one collective for each call, for all of them."""

    def __init__(self, updates: Sequence[Update], reduce: Reduce) -> None:
        self.updates = updates
        self.reduce = reduce

    def sums(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sum of each matrix of each batch.

        Args:
            tensors: (matrices, rows, columns) on this rank, any number of them.

        Returns:
            (matrices, 1, 1) for each, over the whole matrices.
        """
        return self.add_up([tensor.sum(dim=(-2, -1), keepdim=True) for tensor in tensors])

    def norms(self, tensors: Sequence[torch.Tensor], wide: bool = False) -> list[torch.Tensor]:
        """The Frobenius norm of each matrix, in the dtype of its batch: (matrices, 1, 1) for each.

        Args:
            tensors: as of :meth:`sums`. In place of a tensor, the norms of its rows will do: (matrices, rows, 1).
            wide: as of :func:`row_norms`.
        """
        squares = [row_norms(tensor, wide).double().square_().sum(dim=-2, keepdim=True) for tensor in tensors]
        pairs = zip(self.add_up(squares), tensors, strict=True)
        return [total.sqrt_().to(tensor.dtype) for total, tensor in pairs]

    def row_squares(self, tensors: Sequence[torch.Tensor], wide: bool = False) -> list[torch.Tensor]:
        """The sum of the squares of each row, in float64: (matrices, rows on this rank, 1) for each update."""
        return self._over_columns([row_norms(tensor, wide).double().square_() for tensor in tensors])

    def column_squares(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sum of the squares of each column in float64: (matrices, 1, columns on this rank) for each update."""
        return self._over_rows([_column_squares(tensor) for tensor in tensors])

    def row_products(self, tensors: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """W v: (matrices, rows on this rank, 1) from (matrices, columns on this rank, 1), for each update."""
        return self._over_columns([tensor @ vector for tensor, vector in zip(tensors, vectors, strict=True)])

    def column_products(self, tensors: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """W^T u: (matrices, columns on this rank, 1) from (matrices, rows on this rank, 1), for each update."""
        return self._over_rows([tensor.mT @ vector for tensor, vector in zip(tensors, vectors, strict=True)])

    def norms_over_rows(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The norm of vectors with an entry for each row, (matrices, rows on this rank, 1): (matrices, 1, 1).

        Args:
            vectors: one for each update, or several such lists one after the other.
        """
        squares = [vector.square().sum(dim=-2, keepdim=True) for vector in vectors]
        return [total.sqrt() for total in self._over_rows(squares, of_vectors=True)]

    def norms_over_columns(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The norm of vectors with an entry for each column, (matrices, columns on this rank, 1): (matrices, 1, 1)."""
        squares = [vector.square().sum(dim=-2, keepdim=True) for vector in vectors]
        return [total.sqrt() for total in self._over_columns(squares, of_vectors=True)]

    def _over_columns(self, partial: list[torch.Tensor], *, of_vectors: bool = False) -> list[torch.Tensor]:
        """Complete sums over columns: where ranks have all columns, each has the whole sum.

        Args:
            partial: (matrices, rows on this rank, 1); or (matrices, 1, 1), of vectors with an entry for each column.
            of_vectors: whether it is the latter.
        """
        firsts = [(update.first_row, update.rows) for update in self.updates]
        return self._add_up_some(partial, [update.divides_columns for update in self.updates], firsts, -2, of_vectors)

    def _over_rows(self, partial: list[torch.Tensor], *, of_vectors: bool = False) -> list[torch.Tensor]:
        divided = [not update.divides_columns or update.first_row is not None for update in self.updates]
        firsts = [
            (None if update.first_row is None else update.first_column, update.columns) for update in self.updates
        ]
        return self._add_up_some(partial, divided, firsts, -1, of_vectors)

    def _add_up_some(
        self,
        partial: list[torch.Tensor],
        divided: Sequence[bool],
        firsts: Sequence[tuple[int | None, int]],
        dim: int,
        of_vectors: bool,
    ) -> list[torch.Tensor]:
        """Add up the sums of some updates, in place of what this rank has of them.

        Where ranks divide rows and columns, only those with the same rows may add up what they have of these: each adds
        zeros to the others' rows. Of a vector that several ranks have, one counts.

        Args:
            partial: a sum for each update, or several such lists one after the other.
            divided: of which updates.
            firsts: for each update the number of this rank's first entry along ``dim``, None where it has all, and how
                many there are.
            dim: the dimension of the sums that is not summed over.
            of_vectors: whether they are of vectors with an entry for each of what is summed over.
        """
        indices = [index for index in range(len(partial)) if divided[index % len(divided)]]
        wide = []
        for index in indices:
            first, size = firsts[index % len(firsts)]
            if first is None:
                wide.append(partial[index])
            elif of_vectors:
                wide.append(partial[index] if first == 0 else torch.zeros_like(partial[index]))
            else:
                shape = list(partial[index].shape)
                shape[dim] = size
                wide.append(partial[index].new_zeros(shape))
                wide[-1].narrow(dim, first, partial[index].size(dim)).copy_(partial[index])
        for index, total in zip(indices, self.add_up(wide), strict=True):
            first, _ = firsts[index % len(firsts)]
            its_own = first is None or of_vectors
            partial[index] = total if its_own else total.narrow(dim, first or 0, partial[index].size(dim))
        return partial

    def add_up(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Sums over the ranks that hold the other parts of the matrices, of tensors of any shapes."""
        if not parts:
            return []
        total = self.reduce(torch.cat([part.reshape(-1) for part in parts]))
        sizes = [part.numel() for part in parts]
        return [chunk.view(part.shape) for chunk, part in zip(total.split(sizes), parts, strict=True)]


def is_nonzero(norm: torch.Tensor) -> torch.Tensor:
    """Where a norm is large enough to divide by: squares of smaller ones vanish or lose digits."""
    return ~(norm <= 10.0 * torch.finfo(norm.dtype).tiny ** 0.5)  # NaN counts: it must show


def divide_(tensor: torch.Tensor, norm: torch.Tensor, size: float | torch.Tensor = 1.0) -> torch.Tensor:
    """``tensor / norm * size`` in place, and zeros where the norm is next to 0, so that noise is not amplified."""
    return tensor.mul_(torch.where(is_nonzero(norm), 1.0 / norm, 0.0) * size)


def signs_(tensor: torch.Tensor) -> torch.Tensor:
    """The sign of each element, in place and without a copy; NaN stays NaN, of which ``sign_`` makes 0."""
    largest = torch.finfo(tensor.dtype).max
    # Twice, so that the smallest number there is comes to 1, too.
    return tensor.mul_(largest).mul_(largest).clamp_(-1.0, 1.0)


def row_norms(tensor: torch.Tensor, wide: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
    """The norm of each row, (..., rows, 1), in one pass over (..., rows, columns).

    Args:
        tensor: with rows of any dtype.
        wide: for gradients and momentum, which may be as large as 1e20, so that their squares have no place in
            float32: the result is in float64. torch converts what it takes norms of first, here a part at a time.
        out: where to write them; of the dtype that they have, float64 or at least float32.
    """
    dtype = torch.float64 if wide else torch.promote_types(tensor.dtype, torch.float32)
    each = at_once(tensor)
    if not wide or tensor.dtype == dtype or tensor.numel() <= each:
        return torch.linalg.vector_norm(tensor, dim=-1, keepdim=True, dtype=dtype, out=out)
    rows = tensor.reshape(-1, tensor.size(-1)).split(max(1, each // tensor.size(-1)))
    norms = torch.cat([torch.linalg.vector_norm(part, dim=-1, dtype=dtype) for part in rows])
    norms = norms.view(*tensor.shape[:-1], 1)
    return norms if out is None else out.copy_(norms)


def _column_squares(tensor: torch.Tensor) -> torch.Tensor:
    """(matrices, 1, columns) in float64; some rows at a time."""
    found = tensor.new_zeros((tensor.size(0), 1, tensor.size(-1)), dtype=torch.float64)
    each = max(1, at_once(tensor) // max(1, tensor.size(0) * tensor.size(-1)))
    for part in tensor.split(each, dim=-2):
        found += part.to(torch.float64, copy=True).square_().sum(dim=-2, keepdim=True)
    return found


def matrices_of(
    weights: Weights, slices: Sequence[Slices], directions: Sequence[torch.Tensor], reduce: Reduce, shard_of: ShardOf
) -> Matrices:
    """The updates of a chunk: its batches, cut where param groups change.

    Args:
        weights: of the step.
        slices: which matrices, as the engine hands them out.
        directions: (matrices, rows, columns) of each, on this rank.
        reduce: sums over the ranks that hold parts of the same matrices.
        shard_of: tells which shard a weight is.
    """
    runs = by_param_group(weights, slices, directions)
    return Matrices([_update(run, mine, batch, shard_of) for run, mine, batch in runs], reduce)


def _update(slices: Slices, weights: Sequence[ParamStep], direction: torch.Tensor, shard_of: ShardOf) -> Update:
    first, item, shard = weights[0], slices.items[0], shard_of(weights[0].param)
    divides_columns = shard is not None and shard.dim == -1
    # Of a block that is cut in its rows one rank may have all of a matrix: the others take part with no rows of it.
    is_whole = direction.shape[1:] == (item.rows, item.columns) and not slices.ranges[0].broken
    return Update(
        weights=weights,
        slices=slices,
        rows=item.rows,
        columns=item.columns,
        divides_columns=divides_columns,
        first_column=_first_column(shard, first.param.size(-1)) if shard is not None and divides_columns else 0,
        # Of bfloat16 weights, too, norms and second moments are taken in float32.
        direction=_converted(direction, own_dtype(first.param.dtype)),
        group=None if shard is None or is_whole else shard.group,
        first_row=first_row_of(slices) if shard is not None and shard.is_grid else None,
    )


def first_row_of(slices: Slices) -> int:
    """Number of this rank's first row in the whole matrices of some slices."""
    its = slices.ranges[0]
    # Matrices of some rows that shards cut through lie one after the other in their block.
    before = 0 if its.layout.stacked else its.start * its.layout.matrix_rows(its.block)
    first = block_rows_before(its.layout, its.block, its.first_row) - before
    return min(max(0, first), slices.items[0].rows)


def _first_column(shard: Shard, columns: int) -> int:
    return shard.group.rank() * columns if shard.piece is None else shard.piece.columns[0]


def _converted(direction: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A direction in another dtype; one that is expanded from a single element (``StepEngine.visit``) stays so."""
    if any(direction.stride()):
        return direction.to(dtype)
    return direction.new_zeros((), dtype=dtype).expand(direction.shape)
