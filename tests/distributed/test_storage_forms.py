"""Masters as remainders, and momentum in every form, on tensor-parallel shards."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.optimizers.forms import BLOCK
from megatron_muon.optimizers.storage import REMAINDER, TIES, master_of, momentum_of, read
from megatron_muon.routing.layout import SCALAR, STIEFEL, WHOLE, MatrixLayout, Section
from tests.pool import RankPool

QKV = MatrixLayout("qkv", (Section("q", 4), Section("k", 2), Section("v", 2)))
MIXED = MatrixLayout("mixed", (Section("a", 6), Section("b", 2, SCALAR)))
STACK = MatrixLayout("experts", stacked=True)
WEIGHTS: list[tuple[tuple[int, ...], int | None, MatrixLayout]] = [
    ((16, 12), -2, WHOLE), ((12, 4 * BLOCK), -1, WHOLE), ((32, 6), -2, QKV), ((16, 10), -2, MIXED),
    ((2, 8, 12), -2, STACK), ((8, 12), None, WHOLE),
]  # fmt: skip
"""Shapes of whole weights, what is divided, and layouts."""

OPTIONS: list[dict[str, Any]] = [
    {"tp_mode": "owner", "nesterov": True},
    {"tp_mode": "distributed", "weight_decay_method": "l2"},
    {"tp_mode": "duplicated", "weight_decay_method": "cautious"},
    {"blockwise_period": 2},
    {"variant": "normuon"},
    {"variant": "namo", "nesterov": True},
    {"variant": "hyperball", "scale_mode": "none"},
    {"variant": "spectral_sphere"},
    {"variant": "stiefel", "direction": STIEFEL},
    {"variant": "none", "direction": "row_norm"},
    {"variant": "none", "direction": "col_norm", "nesterov": True},
]


def _params(dtype: torch.dtype, direction: str | None) -> list[torch.nn.Parameter]:
    found = []
    for number, (shape, dim, layout) in enumerate(WEIGHTS):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(number)).bfloat16().to(dtype)
        param = torch.nn.Parameter(
            whole if dim is None else whole.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()
        )
        own = layout if direction is None or layout is MIXED else dataclasses.replace(layout, direction=direction)
        param.matrix_layout = own  # type: ignore[attr-defined]
        if dim is not None:
            param.tensor_model_parallel, param.partition_dim = True, dim + 2  # type: ignore[attr-defined]
        found.append(param)
    return found


def _train(dtype: torch.dtype, direction: str | None = None, **options: Any) -> Muon:
    params = _params(dtype, direction)
    optimizer = Muon(
        params, lr=0.05, momentum=0.8, fp32_matmul_prec="highest", chunk_mb=0.001, tp_group=dist.group.WORLD, **options
    )
    for step in range(2):
        for number, (param, (shape, dim, _)) in enumerate(zip(params, WEIGHTS, strict=True)):
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + number)).bfloat16()
            grad = whole if dim is None else whole.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()
            param.decoupled_grad = grad  # type: ignore[attr-defined]
        optimizer.step()
    return optimizer


def remainders() -> list[str]:
    """Options with which a run with remainders has not the bits of one with float32 weights."""
    wrong = []
    for options in OPTIONS:
        wide, narrow = _train(torch.float32, **options), _train(torch.bfloat16, **options, master="remainder")
        for (param, state), (other, its) in zip(narrow.state.items(), wide.state.items(), strict=True):
            equal = torch.equal(read(master_of(param, state)), other) and torch.equal(param, other.bfloat16())
            names = state.keys() - {REMAINDER, TIES}
            equal &= names == its.keys()
            equal &= all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(its[name])) for name in names)
            if not equal:
                wrong.append(f"{options}: {tuple(param.shape)}")
    return wrong


def trained(form: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The weights after two steps, and the momentum of each."""
    optimizer = _train(torch.bfloat16, master="remainder", momentum_dtype=form, tp_mode="owner")
    return [(read(master_of(param, state)), read(momentum_of(state))) for param, state in optimizer.state.items()]


def test_shards_with_remainders_have_the_bits_of_float32(pool: RankPool) -> None:
    assert pool.run(remainders, 2) == [[], []]


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_rounded_momentum_of_shards_is_that_of_the_whole(pool: RankPool, form: str) -> None:
    """Blocks of int8 are of whole weights where shards have a multiple of 256 columns, as here."""
    whole, shards = pool.run(trained, 1, form)[0], pool.run(trained, 2, form)
    for number, (_, dim, _) in enumerate(WEIGHTS):
        first, second = shards[0][number], shards[1][number]
        weights, momenta = (
            each[0] if dim is None else torch.cat(each, dim) for each in zip(first, second, strict=True)
        )
        torch.testing.assert_close(weights, whole[number][0], rtol=0, atol=1e-5)
        assert torch.equal(momenta, whole[number][1]), number
