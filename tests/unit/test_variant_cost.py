"""What variants add to a step: passes over matrices, memory, and sums over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_muon import Muon
from megatron_muon.optimizers.matrices import Matrices
from tools.bench.observe import LiveBytes

ROWS, COLUMNS = 256, 512


class Passes(TorchDispatchMode):
    """Counts whole matrices that operations read or write; the same one once more where it is written in place."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.count += sum(tensor.numel() >= ROWS * COLUMNS for tensor in tensors)
        return result


class Watched:
    """A hook of a variant whose memory and sums over ranks are noted."""

    def __init__(self, hook: Callable[[Matrices], Any]) -> None:
        self.hook, self.peak, self.sums = hook, 0, 0

    def __call__(self, matrices: Matrices) -> Any:
        with LiveBytes() as seen:
            result = self.hook(Matrices(matrices.updates, self._sum))
        self.peak = max(self.peak, seen.peak)
        return result

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        return tensor


def made(**options: Any) -> Muon:
    param = torch.nn.Parameter(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)))
    param.grad = param.detach().clone()
    optimizer = Muon([param], lr=1e-3, nesterov=True, fp32_matmul_prec="highest", **options)
    optimizer.step()
    return optimizer


def passes(optimizer: Muon) -> int:
    with Passes() as counted:
        optimizer.step()
    return counted.count


@pytest.mark.parametrize(
    ("options", "more", "copies", "sums"),
    [
        ({"variant": "normuon"}, 3, 0, 1),
        ({"variant": "hyperball", "scale_mode": "none"}, 5, 0, 2),
        ({"variant": "polargrad", "scale_mode": "none"}, 10, 1, 1),
        ({"variant": "namo"}, 6, 1, 1),
        ({"variant": "adamuon_eo"}, 13, 1, 0),
        ({"variant": "adamuon"}, 22, 1, 1),
    ],
    ids=lambda value: value.get("variant") if isinstance(value, dict) else None,
)
def test_what_variants_add_to_a_step(options: dict[str, Any], more: int, copies: int, sums: int) -> None:
    """Beside plain Muon's passes; in copies of the matrices, and in all-reduces of a chunk under tensor parallelism."""
    plain, optimizer = made(), made(**options)
    assert passes(optimizer) - passes(plain) <= more
    hooks = [Watched(optimizer.variant.adapt), Watched(optimizer.variant.retract)]
    optimizer.variant.adapt, optimizer.variant.retract = hooks  # type: ignore[method-assign]
    optimizer.step()
    assert max(hook.peak for hook in hooks) <= (copies + 0.02) * 4 * ROWS * COLUMNS
    assert sum(hook.sums for hook in hooks) == sums


def test_measured_norms_take_one_pass_and_one_product() -> None:
    """Of ``update_norm`` a norm and a product in place: the matrix is read twice and written once."""
    assert passes(made(scale_mode="update_norm")) - passes(made()) <= 3
