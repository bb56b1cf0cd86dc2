"""How the iterations multiply: one small set of operations, several implementations.

The matrices that the iterations multiply from the left are polynomials of one Gram matrix: they are symmetric and
commute, so that products among them are symmetric too. An implementation may use that to do half the work.
"""

from __future__ import annotations

import itertools

import torch

from megatron_muon.orthogonalize.switches import float32_is_exact

BLOCKS = 4
"""How many blocks a symmetric product is cut into: two do 3/4 of the work, four 5/8, eight 9/16."""


class TorchProducts:
    """Plain matrix products of torch, on any device and in any dtype; the base of all others.

    Shapes: x is (batch, p, q); r, z and q are (batch, p, p), symmetric.

    Memory: a wide X lies row by row. A tall matrix W is given as the view X = ``W.mT``, which lies column by column, so
    that ``X X^T`` is ``W^T W``; what is as large as X is returned in the same order. Libraries for matrix products read
    either order at the same speed, so that no matrix is ever turned in memory.
    """

    name = "torch"
    """Name in the report."""

    compiles = False
    """Whether products of a new shape compile or tune something, which must not happen inside a step."""

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        """``X X^T``."""
        return _product(x, x.mT)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        """``b R + c R R``."""
        return _product(r, r, r, b, c)

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """``a R + b R Z``, for R and Z that commute."""
        return _product(r, z, r if a else None, a, b)

    def apply(self, q: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
        """``alpha Q X``, in the memory order of X."""
        product = _product(x.mT, q.mT).mT if _by_columns(x) else _product(q, x)
        return product if alpha == 1.0 else product.mul_(alpha)

    def multiply_add(self, x: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """``a X + b Z X``, in the memory order of X."""
        return _product(x.mT, z.mT, x.mT, a, b).mT if _by_columns(x) else _product(z, x, x, a, b)

    def symmetric_flops(self, p: int, inner: int) -> int:
        """Operations of a product of a p x ``inner`` with an ``inner`` x p matrix whose result is symmetric."""
        return 2 * p * p * inner


class BlockProducts(TorchProducts):
    """Symmetric results computed by blocks of rows, each up to the diagonal, and mirrored.

    A product costs 5/8 of the full one. It pays where a block is large enough for the matrix product to run at full
    rate (on CPUs; a GPU wants one kernel); smaller matrices are multiplied whole.
    """

    name = "torch, symmetric by blocks"

    def __init__(self, block_rows: int) -> None:
        """
        Args:
            block_rows: the smallest number of rows that a block may have.
        """
        self.block_rows = block_rows

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`TorchProducts`."""
        return self._symmetric(x, x.mT, None, 0.0, 1.0)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        """See :class:`TorchProducts`."""
        return self._symmetric(r, r, r, b, c)

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """See :class:`TorchProducts`."""
        return self._symmetric(r, z, r if a else None, a, b)

    def symmetric_flops(self, p: int, inner: int) -> int:
        """See :class:`TorchProducts`."""
        return sum(2 * (stop - start) * stop * inner for start, stop in self._blocks(p))

    def _blocks(self, p: int) -> list[tuple[int, int]]:
        count = BLOCKS if p >= BLOCKS * self.block_rows else 1
        bounds = [p * index // count for index in range(count + 1)]
        return list(itertools.pairwise(bounds))

    def _symmetric(
        self, left: torch.Tensor, right: torch.Tensor, add: torch.Tensor | None, beta: float, alpha: float
    ) -> torch.Tensor:
        blocks = self._blocks(left.size(-2))
        if len(blocks) == 1:
            return _product(left, right, add, beta, alpha)
        out = left.new_empty((*left.shape[:-1], left.size(-2)))
        for start, stop in blocks:
            rows, columns = left[:, start:stop], right[:, :, :stop]
            addend = None if add is None else add[:, start:stop, :stop]
            block = out[:, start:stop, :stop]
            _product(rows, columns, addend, beta, alpha, out=block)
            if start:
                out[:, :start, start:stop] = block[:, :, :start].mT
        return out


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products take all bits of ``dtype``, and these are enough for ``R (Z + a I)`` in place of ``a R + R Z``.

    That saves a pass over R for each product. With few bits the sum would be rounded where it matters.
    """
    return dtype == torch.float64 or (dtype == torch.float32 and float32_is_exact())  # otherwise TF32


def shifted_(z: torch.Tensor, a: float) -> torch.Tensor:
    """``Z + a I``, in place."""
    z.diagonal(dim1=-2, dim2=-1).add_(a)
    return z


def _by_columns(x: torch.Tensor) -> bool:
    """Whether the elements of a column are neighbours in memory, and those of a row are not."""
    return x.stride(-1) != 1 and x.stride(-2) == 1


def _product(
    left: torch.Tensor,
    right: torch.Tensor,
    add: torch.Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``beta add + alpha left right`` for (batch, rows, inner) and (batch, inner, columns).

    A batch of one is multiplied as a matrix: batched products of BLAS libraries share the batch out over the threads.
    """
    alone, target = left.size(0) == 1, None if out is None else out[0]
    if add is None:
        product = torch.mm(left[0], right[0], out=target)[None] if alone else torch.bmm(left, right, out=out)
        return product if alpha == 1.0 else product.mul_(alpha)
    if alone:
        return torch.addmm(add[0], left[0], right[0], beta=beta, alpha=alpha, out=target)[None]
    return torch.baddbmm(add, left, right, beta=beta, alpha=alpha, out=out)
