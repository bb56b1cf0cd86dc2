"""How numbers are kept between steps: every form against what it stands for, and steps in it against float32."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, Muon
from megatron_muon.optimizers.storage import (
    BFLOAT16,
    BLOCK,
    INT8,
    REMAINDER,
    TIES,
    Kept,
    init_momentum,
    init_remainder,
    master_of,
    momentum_of,
    opened,
    read,
    write,
)
from megatron_muon.routing.layout import SCALAR, MatrixLayout, Section


def _bits(patterns: torch.Tensor) -> torch.Tensor:
    return patterns.to(torch.int32).view(torch.float32)


def _interesting() -> torch.Tensor:
    """float32 numbers of all exponents and both signs: bfloat16 ones, half way between them, and next to both."""
    high = torch.arange(0, 1 << 16, 37) << 16
    high = high[_bits(high).isfinite()]
    ends = [0, 0x80000000, 0x7F7F0000, 0xFF7F0000, 0x00010000, 0x007F0000, 0x00800000]  # 0, largest, smallest normal
    high = torch.cat([high, torch.tensor(ends)])
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234])
    return _bits((high[:, None] + low).flatten() - (1 << 32) * ((high[:, None] + low).flatten() >= 1 << 31))


def _remainder(shape: tuple[int, ...]) -> tuple[torch.Tensor, Kept]:
    weight, state = torch.zeros(shape, dtype=torch.bfloat16), dict[str, Any]()
    init_remainder(weight, state)
    return weight, master_of(weight, state)


@pytest.mark.parametrize("columns", [1, 7, 8, 61, 256])
def test_remainders_are_exact(columns: int) -> None:
    values = _interesting()
    values = values[: values.numel() // columns * columns].view(-1, columns)
    assert not values.isnan().any()
    weight, kept = _remainder(tuple(values.shape))
    for each in (values, values.flip(0), torch.zeros_like(values)):  # the last leave nothing of the ones before
        write(kept, each.clone())
        assert torch.equal(weight, each.bfloat16())
        assert torch.equal(read(kept).view(torch.int32), each.view(torch.int32))
    assert not any(plane.any() for plane in kept.planes)


def test_remainders_of_random_numbers_and_views() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(1 << 31), 1 << 31, (3, 40, 37), generator=generator).int().view(torch.float32)
    values.nan_to_num_(0.5)
    values.view(torch.int32)[:, ::3] &= -(1 << 15)  # many are half way
    weight, kept = _remainder((3, 40, 37))
    for start in range(4):
        with opened([kept], lambda tensors, start=start: [tensors[0][:, start::4]]) as (part,):
            part.copy_(values[:, start::4])
    assert torch.equal(weight, values.bfloat16()) and torch.equal(read(kept), values)
    assert kept.planes[2].any()


def test_what_is_no_number_stays_none() -> None:
    values = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]])
    weight, kept = _remainder((1, 4))
    write(kept, values)
    assert torch.equal(read(kept).nan_to_num(7.0), values.nan_to_num(7.0)) and weight[0, 2].isnan()
    for form in ("bf16", "int8"):
        state: dict[str, Any] = {}
        init_momentum(torch.zeros(2, 4), state, form)
        write(momentum_of(state), torch.cat([values, torch.ones(1, 4)]))
        found = read(momentum_of(state))
        assert found[0, 2].isnan() and ((found[1] - 1.0).abs() < 1e-4).all()


def _momentum(shape: tuple[int, ...], form: str) -> Kept:
    state: dict[str, Any] = {}
    init_momentum(torch.zeros(shape), state, form)
    return momentum_of(state)


@pytest.mark.parametrize("columns", [3, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_int8_errs_by_half_a_unit_and_is_kept_again_without_change(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    sizes = 10.0 ** torch.randint(-44, 38, (50, 1), generator=generator).double()
    values = (torch.randn(50, columns, generator=generator).double() * sizes).float().clamp(-3e38, 3e38)
    values[0], values[1, 1:] = 0.0, 0.0
    kept = _momentum((50, columns), "int8")
    assert kept.form is INT8 and kept.planes[0].dtype == torch.int8
    write(kept, values)
    found, planes = read(kept), [plane.clone() for plane in kept.planes]
    for first in range(0, columns, BLOCK):
        block, own = values[:, first : first + BLOCK], found[:, first : first + BLOCK]
        largest = block.abs().amax(1, keepdim=True).double()
        # The unit is rounded up to 16 bits, or to a multiple of 256 of the smallest number that there is.
        unit = largest / 127 * (1 + 2.0**-15) + 2.0**-141
        assert ((own.double() - block.double()).abs() <= unit * 0.5).all()
        assert own.isfinite().all()
    write(kept, found)  # those of blocks whose unit has 16 bits
    for plane in (*planes, *kept.planes):
        plane[sizes.squeeze(-1) < 1e-30] = 0
    found[sizes.squeeze(-1) < 1e-30] = 0.0
    assert all(map(torch.equal, kept.planes, planes)) and torch.equal(read(kept), found)


def test_bfloat16_is_the_nearest() -> None:
    values = torch.randn(5, 9)
    kept = _momentum((5, 9), "bf16")
    write(kept, values)
    assert kept.form is BFLOAT16 and torch.equal(read(kept), values.bfloat16().float())


QKV = MatrixLayout("qkv", (Section("q", 8), Section("k", 4), Section("v", 4)))
MIXED = MatrixLayout("mixed", (Section("a", 6), Section("b", 2, SCALAR)))
STACK = MatrixLayout("experts", stacked=True)
SHAPES: dict[tuple[int, ...], MatrixLayout | None] = {
    (48, 20): QKV, (20, 300): None, (24, 18): MIXED, (3, 12, 10): STACK, (7, 5): None
}  # fmt: skip


def _weights(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for shape, layout in SHAPES.items():
        found.append(torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype)))
        if layout is not None:
            found[-1].matrix_layout = layout  # type: ignore[attr-defined]
    return found


def _gradients(steps: int, dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        yield [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in SHAPES]


def _stepped(dtype: torch.dtype, gradients: torch.dtype, **options: Any) -> tuple[list[torch.nn.Parameter], Muon]:
    params = _weights(dtype)
    optimizer = Muon(params, lr=0.02, **options)
    for grads in _gradients(5, gradients):
        for param, grad in zip(params, grads, strict=True):
            if param.dtype == grad.dtype:
                param.grad = grad
            else:
                param.decoupled_grad = grad  # type: ignore[attr-defined]
        optimizer.step()
    return params, optimizer


def _masters(optimizer: Muon) -> list[torch.Tensor]:
    return [read(master_of(param, state)) for param, state in optimizer.state.items()]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"nesterov": True, "scale_mode": "update_norm"},
    {"weight_decay_method": "l2"},
    {"weight_decay_method": "cautious", "scalar_optimizer": "lion"},
    {"scale_mode": "spectral_norm", "nesterov": True},
    {"variant": "hyperball", "scale_mode": "none"},
    *({"variant": name} for name in ("polargrad", "adamuon", "adamuon_eo", "normuon", "namo", "spectral_sphere")),
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: " ".join(map(str, options.values())))
def test_steps_with_remainders_are_those_with_float32_masters(options: dict[str, Any]) -> None:
    theirs, plain = _stepped(torch.float32, torch.float32, **options)
    for gradients in (torch.float32, torch.bfloat16):
        params, optimizer = _stepped(torch.bfloat16, gradients, master="remainder", **options)
        for param, master, wide in zip(params, _masters(optimizer), theirs, strict=True):
            assert torch.equal(master, wide) and torch.equal(param, wide.bfloat16())
        for param, wide in zip(params, theirs, strict=True):
            ours, its = optimizer.state[param], plain.state[wide]
            assert ours.keys() - its.keys() == {REMAINDER, TIES}
            for name, value in its.items():
                assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name


def test_float16_weights_have_no_remainders() -> None:
    with pytest.raises(ConfigError, match="master remainder with a weight of 4 x 3 in float16"):
        Muon([torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float16))], master="remainder")


def test_masters_survive_a_reset_and_are_gone_when_weights_are_replaced() -> None:
    _, optimizer = _stepped(torch.bfloat16, torch.bfloat16, master="remainder")
    before = _masters(optimizer)
    optimizer.reset()
    assert all(map(torch.equal, _masters(optimizer), before))
    assert not any("momentum_buffer" in state for state in optimizer.state.values())
    optimizer.forget()
    assert all(torch.equal(read(master_of(param, state)), param.float()) for param, state in optimizer.state.items())


def test_copies_are_exact() -> None:
    _, optimizer = _stepped(torch.bfloat16, torch.bfloat16, master="remainder", momentum_dtype="int8")
    copied = copy.deepcopy(optimizer)
    assert all(map(torch.equal, _masters(copied), _masters(optimizer)))
