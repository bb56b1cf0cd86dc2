"""Our own Triton kernel for products whose result is symmetric: half the tiles are computed, the others mirrored.

``out = alpha A B + beta C`` over a batch, in float16, bfloat16 or float32, summed in float32. It needs no alignment and
no particular layout, runs on any GPU that Triton supports, and under Triton's interpreter (``TRITON_INTERPRET=1``) on
the CPU.
"""

# Triton has no type stubs, is not installed everywhere, and reads annotations of its functions as its own.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_muon.orthogonalize.kernels import KernelProducts, current
from megatron_muon.orthogonalize.kernels.triton_tuning import Tile, fastest
from megatron_muon.orthogonalize.switches import float32_is_exact

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernel multiplies."""


TILES = (Tile(64, 4, 4), Tile(128, 8, 3), Tile(128, 8, 4))
"""What is chosen from by time: small tiles fill the GPU when there are few, large ones read less. (With 4 warps the
large one does not fit into registers.)"""

UNALIGNED = Tile(64, 8, 3)
"""For operands that cannot be read 16 bytes at a time: each element has an address of its own, and with any of the
others these do not fit into registers."""

_GROUP = 8
"""Rows of tiles that are walked together, so that programs that run at the same time share their operands in L2."""


@triton.jit
def _triangle(index):
    """Row and column of an entry of a lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The square root is rounded, on some devices approximate: put right what is off by one.
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def _tile_of(index, tile_rows, GROUP: tl.constexpr):
    """Row and column of tile number ``index`` of a lower triangle, in groups of GROUP rows, each column by column."""
    row, _ = _triangle(index)
    first = row // GROUP * GROUP
    height = tl.minimum(tile_rows - first, GROUP)
    local = index - first * (first + 1) // 2
    # Left of the group's triangle on the diagonal is a rectangle of ``first`` whole columns.
    inner_row, inner_column = _triangle(tl.maximum(local - first * height, 0))
    in_rectangle = local < first * height
    return (
        tl.where(in_rectangle, first + local % height, first + inner_row),
        tl.where(in_rectangle, local // height, first + inner_column),
    )


@triton.jit
def _symmetric_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    p,
    k,
    alpha,
    beta,
    a_batch,
    a_row,
    a_inner,
    b_batch,
    b_inner,
    b_column,
    c_batch,
    c_row,
    c_column,
    out_batch,
    out_row,
    HAS_C: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
):
    tile_rows = tl.cdiv(p, SIZE)
    tiles = tile_rows * (tile_rows + 1) // 2
    program = tl.program_id(0)
    tile_row, tile_column = _tile_of(program % tiles, tile_rows, GROUP)

    # 64 bits from here: a batch of large matrices has more than 2^31 elements, and a row may lie far from the next.
    batch = (program // tiles).to(tl.int64)
    rows = tile_row.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    columns = tile_column.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inner = tl.arange(0, DEPTH).to(tl.int64)
    step = tl.full((), DEPTH, tl.int64)
    a_tile = a_ptr + batch * a_batch + rows[:, None] * a_row + inner[None, :] * a_inner
    b_tile = b_ptr + batch * b_batch + inner[:, None] * b_inner + columns[None, :] * b_column

    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        left = inner < k - start
        a = tl.load(a_tile, mask=(rows < p)[:, None] & left[None, :], other=0.0)
        b = tl.load(b_tile, mask=left[:, None] & (columns < p)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_tile += step * a_inner
        b_tile += step * b_inner

    inside = (rows < p)[:, None] & (columns < p)[None, :]
    total = total * alpha
    if HAS_C:
        c_tile = c_ptr + batch * c_batch + rows[:, None] * c_row + columns[None, :] * c_column
        total += beta * tl.load(c_tile, mask=inside, other=0.0).to(tl.float32)
    if tile_row == tile_column:  # rounding may differ across the diagonal: mirror here too
        total = tl.where(rows[:, None] >= columns[None, :], total, tl.trans(total))

    result = total.to(out_ptr.dtype.element_ty)
    out = out_ptr + batch * out_batch
    tl.store(out + rows[:, None] * out_row + columns[None, :], result, mask=inside)
    if tile_row != tile_column:
        mirrored = (columns < p)[:, None] & (rows < p)[None, :]
        tl.store(out + columns[:, None] * out_row + rows[None, :], tl.trans(result), mask=mirrored)


INTERPRETED = not isinstance(_symmetric_kernel, triton.JITFunction)
"""Whether Triton's interpreter stands in for a GPU: ``TRITON_INTERPRET=1`` when Triton was first imported."""


def symmetric_product(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``alpha A B + beta C`` where that is symmetric: the part on and below the diagonal, mirrored.

    Args:
        a: (batch, p, k), any strides; float16, bfloat16 or float32.
        b: (batch, k, p), any strides, the dtype of ``a``.
        c: (batch, p, p), symmetric, any strides, the dtype of ``a``.
        alpha: factor of the product.
        beta: factor of ``c``; not used without it.
        tile: how to cut the result; by default the fastest of :data:`TILES` on this GPU for products of about this
            size, see :func:`~megatron_muon.orthogonalize.kernels.triton_tuning.fastest`, or :data:`UNALIGNED`. Under
            the interpreter the first of :data:`TILES`.

    Returns:
        (batch, p, p), contiguous, exactly symmetric, in the dtype of ``a``. float32 is multiplied in TF32 unless
        torch's products are exact. Not differentiable.

    Raises:
        TypeError: for another dtype.
        ValueError: for shapes that do not fit.
    """
    _check(a, b, c)
    if INTERPRETED and a.dtype == torch.bfloat16:
        # The interpreter has no bfloat16 arithmetic: it would multiply bit patterns (triton-lang/triton#11584).
        wide = symmetric_product(
            a.float(), b.float(), None if c is None else c.float(), alpha=alpha, beta=beta, tile=tile
        )
        return wide.to(a.dtype)
    batch, p, k = a.shape
    out = a.new_empty((batch, p, p))
    if out.numel() == 0:
        return out
    addend = out if c is None else c

    def launch(tile: Tile) -> None:
        tile_rows = -(-p // tile.size)
        _symmetric_kernel[(batch * (tile_rows * (tile_rows + 1) // 2),)](
            a,
            b,
            addend,
            out,
            p,
            k,
            float(alpha),
            float(beta),
            *a.stride(),
            *b.stride(),
            *addend.stride(),
            *out.stride()[:2],
            HAS_C=c is not None,
            PRECISION=_precision(a.dtype),
            DEPTH=_depth(a.dtype),
            GROUP=_GROUP,
            SIZE=tile.size,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,  # Triton's default changes between versions
        )

    with current(a.device):
        if tile is None and INTERPRETED:
            tile = TILES[0]
        elif tile is None and not all(map(_is_aligned, (a, b, addend, out))):
            tile = UNALIGNED
        elif tile is None:
            kind = (str(a.dtype), *map(_bucket, (p, k, min(batch, 64))))
            tile = fastest(_symmetric_kernel, TILES, kind, a.device, launch)
        launch(tile)
    return out


class TritonProducts(KernelProducts):
    """Symmetric products by :func:`symmetric_product`, of any size and layout from 256 rows on; the others by torch."""

    name = "Triton, symmetric"

    def symmetric(
        self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
    ) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.kernels.KernelProducts`."""
        return symmetric_product(a, b, c, alpha=alpha, beta=beta)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why :class:`TritonProducts` cannot be used there, or None."""
    if dtype not in DTYPES:
        return "takes float16, bfloat16 and float32 only"
    if device.type == "cpu" and not INTERPRETED:
        return "needs a GPU (on a CPU it runs under Triton's interpreter alone: TRITON_INTERPRET=1)"
    if device.type == "cuda" and INTERPRETED:
        return "runs in Triton's interpreter, on the CPU: unset TRITON_INTERPRET"
    if device.type not in ("cpu", "cuda"):
        return f"does not run on {device.type}"
    return None


def _check(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None) -> None:
    if a.dtype not in DTYPES:
        raise TypeError(f"symmetric_product of {a.dtype}: give float16, bfloat16 or float32")
    batch, p, k = a.shape
    if b.shape != (batch, k, p) or (c is not None and c.shape != (batch, p, p)):
        shapes = " and ".join(str(tuple(x.shape)) for x in (b, c) if x is not None)
        raise ValueError(f"symmetric_product of {tuple(a.shape)} with {shapes}: the shapes do not fit")
    for other in (b, c):
        if other is not None and (other.dtype != a.dtype or other.device != a.device):
            raise TypeError(f"symmetric_product of {a.dtype} on {a.device} with {other.dtype} on {other.device}")


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32 and not float32_is_exact():
        return "tf32"
    return "ieee"


def _depth(dtype: torch.dtype) -> int:
    """Number of elements of a tile along k: 128 bytes, one line of shared memory."""
    return 128 // dtype.itemsize


def _is_aligned(x: torch.Tensor) -> bool:
    """Whether Triton knows that the elements of a row or column can be read 16 bytes at a time, masked or not."""
    numbers = (x.data_ptr(), *x.shape[1:], *(stride for stride in x.stride() if stride != 1))
    return 1 in x.stride()[1:] and all(number % 16 == 0 for number in numbers)


def _bucket(size: int) -> int:
    """The power of two that is at least ``size``: products in one bucket take the tile of the first."""
    return 1 << (size - 1).bit_length()
