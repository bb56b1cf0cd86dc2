"""Ranks of which only shapes are there: what a plan makes each of them communicate, by the code of the step itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_muon.engine import sharded, step
from megatron_muon.engine.modes import Machine
from megatron_muon.engine.packing import triangle_numel
from megatron_muon.engine.plan import Weight
from megatron_muon.engine.step import StepEngine
from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import TorchProducts
from tests.fake_cuda.groups import Call, recorded_groups
from tests.random_weights import BUDGETED

__all__ = ["ITERATION", "Recorder", "calls_of", "symbolic_rank"]

META = torch.device("meta")
FREE = Machine(5e14, 1e20, 0.0)
"""Rates by which messages cost nothing: matrices are lent and split wherever they can be."""


def _empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=META)


def _from_triangle(triangle: torch.Tensor, p: int) -> torch.Tensor:
    assert triangle.size(1) == triangle_numel(p)
    return _empty((triangle.size(0), p, p), triangle.dtype)


class _Products(TorchProducts):
    """Results of the right shapes: torch's own operations on meta tensors take a millisecond each."""

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        return _empty((x.size(0), x.size(-2), x.size(-2)), x.dtype)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        return torch.empty_like(r)

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        return torch.empty_like(r)

    def apply(self, q: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
        return torch.empty_like(x)

    def multiply_add(self, x: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        return torch.empty_like(x)


class _Shapes(Orthogonalizer):
    """What is done to matrices without communication, as shapes; what communicates is the package's."""

    def use_up(self, given: list[torch.Tensor]) -> torch.Tensor:
        return _empty(given.pop().shape, self.dtype)

    def normalized(
        self, x: torch.Tensor, scale: float = 1.0, squares: torch.Tensor | None = None, overwrite: bool = False
    ) -> torch.Tensor:
        return _empty(x.shape, self.dtype)

    def polynomials(self, gram: torch.Tensor, segment: int, scale: float = 1.0) -> tuple[torch.Tensor, None]:
        return torch.empty_like(gram), None


ITERATION = _Shapes(iteration("quintic", 2), torch.float16, products=_Products(), budgeted=BUDGETED)


class Recorder:
    """Hears what a rank communicates: all of it from tensors of its device, which are contiguous.

    Attributes:
        calls: so far.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._open: set[int] = set()

    def started(self, call: Call, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> int:
        """See :class:`tests.fake_cuda.groups.Listener`."""
        for tensor in (*reads, *writes):
            assert tensor.device == META and tensor.is_contiguous(), call
        self.calls.append(call)
        self._open.add(len(self.calls))
        return len(self.calls)

    def waited(self, number: int) -> None:
        """See :class:`tests.fake_cuda.groups.Listener`."""
        self._open.discard(number)

    def place(self) -> str:
        """Nothing: a plan has thousands of them."""
        return ""

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """See :class:`tests.fake_cuda.groups.Listener`."""
        return tensor.dtype if tensor._base is None else tensor._base.dtype

    def taken(self) -> list[Call]:
        """The calls since the last time; all have been waited for."""
        assert not self._open, [self.calls[number - 1] for number in self._open]
        calls, self.calls = self.calls, []
        return calls


@contextmanager
def symbolic_rank(rank: int, ranks: int) -> Iterator[Recorder]:
    """This process is one rank of a world whose tensors have no contents, and whose messages cost nothing."""
    recorder = Recorder()
    with (
        recorded_groups(rank, ranks, recorder),
        patch.object(step.Machine, "of", lambda device: FREE),
        patch.object(sharded, "square_sums", lambda x: _empty((x.size(0), 1, 1), torch.float64)),
        patch.object(sharded, "lower_triangle", lambda x: _empty((x.size(0), triangle_numel(x.size(-1))), x.dtype)),
        patch.object(sharded, "from_triangle", _from_triangle),
        torch.no_grad(),
    ):
        yield recorder


def calls_of(
    recorder: Recorder,
    weights: Sequence[Weight],
    groups: Mapping[str, dist.ProcessGroup],
    mode: str,
    chunk_mb: float,
) -> list[Call]:
    """What one step of an engine communicates."""
    engine = StepEngine(
        weights,
        groups,
        ITERATION,
        mode=mode,
        dtype=torch.float32,
        wire_dtype=torch.bfloat16,
        chunk_mb=chunk_mb,
        device=META,
    )

    def write(slices: object, directions: list[torch.Tensor], reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        reduce(_empty((len(directions),), torch.float32))  # as variants do, which measure whole matrices

    engine.run(lambda slices, batches: None, write)
    return recorder.taken()
