"""What a step holds, multiplies and sends: seen in the operations that torch carries out, for any optimizer alike."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_muon.engine.step import StepEngine
from megatron_muon.orthogonalize.products import TorchProducts

__all__ = ["CountedProducts", "LiveBytes", "Observer", "counted_products"]


class LiveBytes(TorchDispatchMode):
    """Sees which tensors are made and die while it is active.

    Attributes:
        live: number of bytes in tensors that were made under it and are still alive, also when it has ended.
        peak: greatest number of bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):  # what was there before does not count
            self._meet(tensor, 0)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._meet(tensor, tensor.untyped_storage().nbytes())
        return result

    def _meet(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Observer(LiveBytes):
    """Counts while it is active. Slow: for a step that is not timed.

    Attributes:
        flops: operations of matrix products, by the dtype of what is multiplied; those of torch alone, since kernels of
            others are not seen.
        collectives: number of collective operations.
        bytes: sent to other ranks; all-gathers and all-reduces by the ring algorithm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()
        self.collectives = 0
        self.bytes = 0.0

    @property
    def product_dtype(self) -> str:
        """Of most operations, as ``--dtype`` says it; empty if there were none."""
        if not self.flops:
            return ""
        name = str(max(self.flops, key=lambda dtype: self.flops[dtype])).removeprefix("torch.")
        return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}.get(name, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "aten":
            self._count_product(func.overloadpacket.__name__, args)
        elif func.namespace == "c10d":
            self._count_collective(func.overloadpacket.__name__, args)
        return result

    def _count_product(self, name: str, args: Any) -> None:
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.flops[left.dtype] += 2 * left.numel() * right.size(-1)

    def _count_collective(self, name: str, args: Any) -> None:
        if name == "barrier":
            return
        if name not in _SENT:
            raise RuntimeError(f"the bytes that c10d.{name} sends are not known: add it to the benchmark's table")
        group, sent = _SENT[name]
        self.collectives += 1
        self.bytes += sent(args, dist.ProcessGroup.unbox(args[group]))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(tensors))


def _all_gather(args: Any, group: dist.ProcessGroup) -> float:
    return (group.size() - 1) * _size(args[1])


def _all_reduce(args: Any, group: dist.ProcessGroup) -> float:
    return 2 * (group.size() - 1) * _size(args[0]) / group.size()


def _reduce_scatter(args: Any, group: dist.ProcessGroup) -> float:
    return (group.size() - 1) * _size(args[0])


def _all_to_all(args: Any, group: dist.ProcessGroup) -> float:
    _, given, _, _, splits = args[:5]
    own = splits[group.rank()] / max(1, sum(splits)) if splits else 1 / group.size()
    return _size(given) * (1 - own)


_SENT = {
    "allgather_": (2, _all_gather),
    "_allgather_base_": (2, _all_gather),
    "allreduce_": (1, _all_reduce),
    "reduce_scatter_": (2, _reduce_scatter),
    "_reduce_scatter_base_": (2, _reduce_scatter),
    "alltoall_base_": (2, _all_to_all),
}
"""c10d operation -> (position of its group, bytes that this rank sends)."""


class CountedProducts:
    """Another implementation of the products, and how many operations they would need.

    The result of a symmetric product holds every number twice; that half of the work is not needed.

    Attributes:
        needed: operations, with symmetric results once.
        done: operations, as the implementation counts them.
    """

    def __init__(self, products: TorchProducts) -> None:
        """
        Args:
            products: does the work.
        """
        self._products = products
        self.needed = self.done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._products, name)

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`megatron_muon.orthogonalize.products.TorchProducts`; so are the others."""
        self._symmetric(x)
        return self._products.gram(x)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        """``b R + c R R``."""
        self._symmetric(r)
        return self._products.quadratic(r, b, c)

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """``a R + R Z``."""
        self._symmetric(r)
        return self._products.commuting(r, z, a, b)

    def apply(self, q: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
        """``alpha Q X``."""
        self._plain(x)
        return self._products.apply(q, x, alpha)

    def multiply_add(self, x: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """``a X + Z X``."""
        self._plain(x)
        return self._products.multiply_add(x, z, a, b)

    def _symmetric(self, x: torch.Tensor) -> None:
        count, (p, inner) = math.prod(x.shape[:-2]), x.shape[-2:]
        self.needed += count * p * (p + 1) * inner
        self.done += count * self._products.symmetric_flops(p, inner)

    def _plain(self, x: torch.Tensor) -> None:
        count, (p, q) = math.prod(x.shape[:-2]), x.shape[-2:]
        self.needed += count * 2 * p * p * q
        self.done += count * 2 * p * p * q


@contextmanager
def counted_products(engine: StepEngine) -> Iterator[CountedProducts]:
    """Count the products of our engine; its own implementation does the work, and chooses the same iterations."""
    before = engine.orthogonalizer.products
    counted = CountedProducts(before)
    engine.orthogonalizer.products = cast(TorchProducts, counted)
    try:
        yield counted
    finally:
        engine.orthogonalizer.products = before
