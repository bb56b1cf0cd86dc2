"""No mode and no variant makes the host wait for the device within a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_muon import Muon
from megatron_muon.choices import SECOND_MOMENTS
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.optimizers.stiefel_solvers import SOLVERS
from megatron_muon.routing.layout import BALLS, MSIGN, STIEFEL
from tests.distributed.test_adaptive import CASES, grad, weight
from tests.distributed.test_engine import GATED, MIXED, NUMBERS_AND_MODES, Given, random
from tests.pool import RankPool


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose results the host must see."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name.strip("_") in {each.strip("_") for each in self.FORBIDDEN}:
            raise AssertionError(f"the step waits for the device: {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(name: str) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"the step waits for the device: Tensor.{name}")

        return refused

    with monkeypatch.context() as patch, NoWaiting():
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


def steps_without_waiting() -> list[tuple[str, str]]:
    """The types of numbers and modes whose second step went through.

    Rows of the scalar optimizer follow Lion: torch's AdamW reads its step number, a tensor of the host.
    """
    group, done = dist.group.WORLD, []
    given = (*MIXED, Given((32, 12), 0, GATED))
    for dtype, mode in NUMBERS_AND_MODES:
        params = [each.parameter(group, random(each.shape, 1, torch.float32)) for each in given]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = Muon(
            params, tp_group=group, tp_mode=mode, nesterov=True, chunk_mb=0.003, scalar_optimizer="lion", ns_dtype=dtype
        )
        optimizer.step()  # compares the plans
        optimizer.engines.compared_elsewhere = (
            True  # as Megatron-Core's optimizers are, which compare gradients by themselves
        )
        before = [param.detach().clone() for param in params]
        with no_reading(pytest.MonkeyPatch()):
            optimizer.step()
        assert not any(torch.equal(param, its) for param, its in zip(params, before, strict=True))
        done.append((dtype, mode))
    return done


def test_no_step_of_a_mode_waits_for_the_device(pool: RankPool) -> None:
    assert pool.run(steps_without_waiting, 2) == [NUMBERS_AND_MODES] * 2


@pytest.mark.parametrize("read", ["item", "tolist", "bool", "nonzero"])
def test_waiting_would_be_seen(read: str) -> None:
    """The test above can fail."""
    x = torch.ones(2)
    reads = {
        "item": lambda: x[0].item(),
        "tolist": lambda: x.tolist(),
        "bool": lambda: bool(x[0]),
        "nonzero": lambda: x.nonzero(),
    }
    with pytest.raises(AssertionError, match="waits for the device"), no_reading(pytest.MonkeyPatch()):
        reads[read]()


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (MSIGN, {"variant": method}) for method in SECOND_MOMENTS},
    "polargrad": (MSIGN, {"variant": "polargrad", "scale_mode": "none"}),
    "hyperball": (MSIGN, {"variant": "hyperball", "scale_mode": "none"}),
    "update_norm": (MSIGN, {"scale_mode": "update_norm"}),
    "spectral_norm": (MSIGN, {"scale_mode": "spectral_norm", "damping_depth": 2.0}),
    "cautious": (MSIGN, {"weight_decay_method": "cautious"}),
    "sphere": (MSIGN, {"variant": "spectral_sphere"}),
    **{direction: (direction, {}) for direction in BALLS},
    **{solver: (STIEFEL, {"variant": StiefelMuon(solver, 2)}) for solver in SOLVERS},
}


def step_without_waiting(name: str) -> bool:
    """Whether a second step went through and moved every weight. The first compares the plans of the ranks, as each
    does outside Megatron-Core."""
    direction, options = VARIANTS[name]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    params = []
    for shape, dim, layout in (CASES["rows, split"], CASES["columns, wide"]):
        param = torch.nn.Parameter(weight(*shape, seed=1).float().chunk(ranks, dim=dim)[rank].clone())
        param.tensor_model_parallel, param.partition_dim = True, dim
        param.matrix_layout = dataclasses.replace(layout, direction=direction)
        param.grad = grad(shape, 0).float().chunk(ranks, dim=dim)[rank].contiguous()
        params.append(param)
    optimizer = Muon(params, lr=0.1, tp_group=dist.group.WORLD, nesterov=True, **options)
    optimizer.step()
    optimizer.engines.compared_elsewhere = True
    before = [param.detach().clone() for param in params]
    with no_reading(pytest.MonkeyPatch()):
        optimizer.step()
    return not any(torch.equal(param, its) for param, its in zip(params, before, strict=True))


def every_variant() -> list[str]:
    return [name for name in VARIANTS if step_without_waiting(name)]


def test_no_step_of_a_variant_waits_for_the_device(pool: RankPool) -> None:
    assert pool.run(every_variant, 2)[0] == list(VARIANTS)
