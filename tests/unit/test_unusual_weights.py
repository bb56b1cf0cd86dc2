"""Weights without elements, of several types of numbers, of 16 bits alone, and such as join late."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.routing.layout import SCALAR, WHOLE, MatrixLayout, Section

GATED = MatrixLayout("in_proj", (Section("q", 8), Section("beta", 2, SCALAR)))
HEADS = MatrixLayout("qkv", (Section("q", 8, matrix_rows=4), Section("k", 4)))


def parameter(
    rows: int, columns: int, layout: MatrixLayout = WHOLE, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(rows, columns, generator=generator).to(dtype))
    param.matrix_layout = layout
    return param


def step(optimizer: Muon, steps: int = 2) -> list[torch.Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number in range(steps):
        for param in params:
            generator = torch.Generator().manual_seed(number + 50)
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("options", [{}, {"scale_mode": "aspect_ratio"}, {"scale_mode": "spectral_norm"}])
def test_empty_weights_have_no_update(shape: tuple[int, int], options: dict[str, Any]) -> None:
    """Alone, and beside others, whose steps are as without them."""
    step(Muon([parameter(*shape)], **options))
    (_, beside), (alone,) = (
        step(Muon([parameter(*shape), parameter(6, 4)], **options)),
        step(Muon([parameter(6, 4)], **options)),
    )
    assert torch.equal(beside, alone)


@pytest.mark.parametrize(
    "layout", [GATED, HEADS, replace(WHOLE, direction="sign"), replace(WHOLE, direction="row_norm")]
)
def test_empty_fused_weights_have_no_update(layout: MatrixLayout) -> None:
    optimizer = Muon([parameter(0, 4, layout)])
    step(optimizer)
    optimizer.prepare()


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (WHOLE, {}),
        (WHOLE, {"scale_mode": "spectral_norm"}),
        (replace(WHOLE, direction="sign"), {}),
        (WHOLE, {"variant": "spectral_sphere"}),
        (replace(WHOLE, direction="stiefel"), {"variant": "stiefel"}),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_each_weight_has_a_step_in_its_own_numbers(layout: MatrixLayout, options: dict[str, Any], order: int) -> None:
    """float64 beside float32 weights: in whichever order, each gets the bits that it gets alone."""
    options = {"fp32_matmul_prec": "highest", **options}
    kinds = [torch.float64, torch.float64, torch.float32][::order]
    given = [parameter(6, 4, layout, dtype, seed) for seed, dtype in enumerate(kinds)]
    beside = step(Muon(given, **options), 3)
    for seed, dtype in enumerate(kinds):
        (alone,) = step(Muon([parameter(6, 4, layout, dtype, seed)], **options), 3)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6  # in batches of one and two
        torch.testing.assert_close(beside[seed], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("direction", "options"),
    [
        ("sign", {}),
        ("sign", {"weight_decay_method": "l2"}),
        ("stiefel", {"variant": "stiefel"}),
        ("msign", {"variant": "spectral_sphere"}),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_weights_may_have_rows_under_adam_alone(direction: str, options: dict[str, Any], beside: bool) -> None:
    """They have no matrix, whose momentum could be updated: the step stopped after it had changed other weights."""
    alone = MatrixLayout("gates", (Section("beta", 2, SCALAR), Section("alpha", 1, SCALAR)), direction=direction)
    params = [parameter(3, 4, alone), *([parameter(6, 4, seed=1)] if beside else [])]
    found = step(Muon(params, lr=0.1, **options))
    expected = step(Muon([parameter(3, 4, replace(alone, direction="msign"))], lr=0.1))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("beside", [0, 2])
def test_second_moments_are_kept_from_step_to_step(rows: int, beside: int) -> None:
    """Those of weights that have the shape of their rows under Adam were copied in each step, and looked at."""
    sections = (Section("beta", 3, SCALAR), *([Section("q", beside)] if beside else []))
    param = parameter(rows + beside * bool(rows), 4, MatrixLayout("gates", sections))
    optimizer = Muon([param])
    step(optimizer, 1)
    first = optimizer.state[param]["exp_avg_sq"]
    step(optimizer, 2)
    assert optimizer.state[param]["exp_avg_sq"] is first and optimizer.state[param]["step"] == 3
    assert first.shape == (rows, 4)


@pytest.mark.parametrize("shape", [(5, 0), (0, 5, 4)])
def test_weights_without_elements_have_no_rows_under_adam(shape: tuple[int, ...]) -> None:
    """Without columns, or stacks without experts."""
    layout = MatrixLayout("gates", (Section("beta", 2, SCALAR), Section("q", 3)), stacked=len(shape) == 3)
    param = torch.nn.Parameter(torch.zeros(shape))
    param.matrix_layout = layout
    optimizer = Muon([param])
    for _ in range(2):
        param.grad = torch.zeros(shape)
        optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].shape == (*shape[:-2], 2, shape[-1])


@pytest.mark.parametrize(
    ("direction", "options"),
    [
        *(("msign", {"ns_dtype": name}) for name in ("fp32", "bf16", "fp16")),
        *(("msign", {"coefficient_type": name}) for name in ("turbo_muon", "cubic5")),
        ("msign", {"scale_mode": "update_norm"}),
        ("msign", {"scale_mode": "spectral_norm"}),
        ("row_norm", {}),
        ("col_norm", {}),
        ("sign", {}),
        *(("msign", {"variant": name}) for name in ("adamuon", "adamuon_eo", "normuon", "namo", "spectral_sphere")),
        ("msign", {"variant": "hyperball", "scale_mode": "none"}),
        *(("stiefel", {"variant": StiefelMuon(name, 5)}) for name in ("admm", "dual_ascent", "fixed_point")),
    ],
)
def test_updates_do_not_depend_on_the_size_of_gradients(direction: str, options: dict[str, Any]) -> None:
    """A power of two changes no bit. Others round, which is amplified: a hundredfold by solvers that still move."""

    def after(factor: float) -> torch.Tensor:
        param = parameter(10, 6, replace(WHOLE, direction=direction))
        optimizer = Muon([param], **{"lr": 0.1, "momentum": 0.9, "fp32_matmul_prec": "highest", **options})
        for seed in (9, 10):
            param.grad = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed)) * factor
            optimizer.step()  # the second with what the first has left in the state
        return param.detach()

    usual = after(1.0)
    for exponent in (-100, -66, -27, 27, 66, 100):
        assert torch.equal(after(2.0**exponent), usual), exponent
    rounding = 2e-2 if options.get("ns_dtype", "fp32") != "fp32" else 1e-2 if direction == "stiefel" else 1e-4
    for factor in (1e-30, 1e-20, 1e-8, 1e8, 1e20, 1e30):
        torch.testing.assert_close(after(factor), usual, rtol=0, atol=rounding)


@pytest.mark.parametrize("method", ["decoupled", "independent", "cautious"])
def test_weights_of_16_bits_are_rounded_once(method: str) -> None:
    """Decay and update together: each may be less than half a unit, which alone would never change the weight."""
    options = {"lr": 1e-3, "weight_decay": 1.0, "weight_decay_method": method, "scale_mode": "none", "momentum": 0.0}
    options["ns_dtype"] = "bf16"  # which rounds the gradients of both alike
    if method == "independent":
        options["weight_decay"] = 1e-3
    narrow, wide = parameter(16, 16, dtype=torch.bfloat16), parameter(16, 16, dtype=torch.bfloat16)
    wide.data = wide.data.float()
    step(Muon([narrow], **options), 1), step(Muon([wide], **options), 1)
    assert torch.equal(narrow, wide.bfloat16()) and narrow.dtype == torch.bfloat16


@pytest.mark.parametrize("rule", ["adam", "lion"])
def test_rows_of_16_bits_are_rounded_once(rule: str) -> None:
    """The weights' and the moments', which take part in the update as they are before."""
    options = {"lr": 1e-3, "weight_decay": 1.0, "scalar_optimizer": rule}
    narrow, wide = (parameter(10, 16, GATED, torch.bfloat16) for _ in range(2))
    wide.data = wide.data.float()
    one, other = Muon([narrow], **options), Muon([wide], **options)
    narrow.grad = torch.randn(10, 16, generator=torch.Generator().manual_seed(9)).bfloat16()
    wide.grad = narrow.grad.float()
    one.step(), other.step()
    assert torch.equal(narrow[8:], wide[8:].bfloat16())
    for name, value in other.state[wide].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(one.state[narrow][name][8:], value[8:].bfloat16()), name


def test_rows_that_join_late_begin_as_in_a_fresh_optimizer() -> None:
    """Adam's bias correction counts a weight's own updates, not the group's."""
    late, alone, early = (parameter(10, 6, GATED, seed=seed) for seed in (1, 1, 2))
    optimizer, fresh = Muon([early, late], lr=0.1), Muon([alone], lr=0.1)
    for number in range(30):
        early.grad = torch.randn(10, 6, generator=torch.Generator().manual_seed(number))
        if number >= 28:
            late.grad, alone.grad = early.grad.clone(), early.grad.clone()
            fresh.step()
        optimizer.step()
    torch.testing.assert_close(late[8:], alone[8:], rtol=0, atol=1e-7)
    assert optimizer.state[late]["step"] == 2 and optimizer.param_groups[0]["step"] == 30
