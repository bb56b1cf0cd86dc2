"""Rows of a Muon weight under the scalar optimizer's rule, against that optimizer on a weight of these rows alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from emerging_optimizers.scalar_optimizers import Lion

from megatron_muon import Muon, state_bytes
from megatron_muon.checkpoint.param_state import ParamState
from megatron_muon.optimizers.fading import PEAK
from megatron_muon.optimizers.scalar_rows import SECOND_MOMENT, cut_second_moment, whole_second_moment
from megatron_muon.routing.layout import ORTHOGONALIZE, SCALAR, MatrixLayout, Section

STEPS = 50
LR, LR_MULT, WD, WD_MULT = 0.02, 0.35, 0.1, 0.5
# Two blocks and gate rows, which stand apart within a period (one head) and repeat with it.
LAYOUT = MatrixLayout(
    "in_proj", (Section("q", 4), Section("b", 1, SCALAR), Section("v", 6), Section("a", 2, SCALAR)), stacked=False
)
PERIODS, COLUMNS = 3, 8
ROWS = PERIODS * LAYOUT.period
PLAIN = MatrixLayout("in_proj", (Section("q", 4), Section("v", 6)))
"""The same weight without the scalar rows."""


def rows(weight: torch.Tensor, rule: str) -> torch.Tensor:
    """A copy of the rows under ``rule``, found by their numbers."""
    rules = [section.rule for section in LAYOUT.sections for _ in range(section.rows)] * PERIODS
    return weight.detach()[[its_rule == rule for its_rule in rules]].clone()


def parameter(dtype: torch.dtype) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(3)
    param = torch.nn.Parameter(torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator).to(dtype))
    param.matrix_layout = LAYOUT
    return param


def gradients(dtype: torch.dtype, steps: int = STEPS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator).to(dtype) for _ in range(steps)]


def warm_up_and_cosine(step: int) -> float:
    return (step + 1) / 10 if step < 10 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / (STEPS - 10)))


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_cosine)


def muon(params: list[torch.nn.Parameter], **options: Any) -> Muon:
    values: dict[str, Any] = {
        "lr": LR,
        "weight_decay": WD,
        "scalar_lr_mult": LR_MULT,
        "scalar_wd_mult": WD_MULT,
        "scalar_betas": (0.8, 0.97),
        "scalar_eps": 1e-6,
        "fp32_matmul_prec": "highest",
    }
    return Muon(params, **{**values, **options})


def train(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, grads: list[torch.Tensor]) -> None:
    scheduler = scheduled(optimizer)
    for grad in grads:
        param.grad = grad
        optimizer.step()
        scheduler.step()


# In float64 the two orders of the same operations differ by rounding alone; float32 rounds 2^29 times as coarsely.
DTYPES = [(torch.float64, 1e-14), (torch.float32, 2e-6)]


@pytest.mark.parametrize("dtype,tolerance", DTYPES)
def test_equals_adamw_on_these_rows_alone(dtype: torch.dtype, tolerance: float) -> None:
    param = parameter(dtype)
    alone = torch.nn.Parameter(rows(param, SCALAR))
    start = alone.detach().clone()
    adam = torch.optim.AdamW([alone], lr=LR * LR_MULT, betas=(0.8, 0.97), eps=1e-6, weight_decay=WD * WD_MULT)
    grads = gradients(dtype)
    optimizer = muon([param])
    train(optimizer, param, grads)
    train(adam, alone, [rows(grad, SCALAR) for grad in grads])
    assert (alone - start).abs().amax(dim=1).min() > 0.01, "every row has moved"
    torch.testing.assert_close(rows(param, SCALAR), alone.detach(), rtol=0, atol=tolerance)
    state, reference = optimizer.state[param], adam.state[alone]
    torch.testing.assert_close(rows(state["momentum_buffer"], SCALAR), reference["exp_avg"], rtol=0, atol=tolerance)
    torch.testing.assert_close(state[SECOND_MOMENT], reference["exp_avg_sq"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype,tolerance", DTYPES)
def test_equals_lion_on_these_rows_alone(dtype: torch.dtype, tolerance: float) -> None:
    param = parameter(dtype)
    alone = torch.nn.Parameter(rows(param, SCALAR))
    lion = Lion([alone], lr=LR * LR_MULT, betas=(0.9, 0.95), weight_decay=WD * WD_MULT)
    grads = gradients(dtype)
    optimizer = muon([param], scalar_optimizer="lion", scalar_betas=(0.9, 0.95))
    train(optimizer, param, grads)
    train(lion, alone, [rows(grad, SCALAR) for grad in grads])
    torch.testing.assert_close(rows(param, SCALAR), alone.detach(), rtol=0, atol=tolerance)
    assert SECOND_MOMENT not in optimizer.state[param], "Lion has no second moment"


@pytest.mark.parametrize("scalar_optimizer", ["adam", "lion"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_other_rows_do_not_notice(scalar_optimizer: str, nesterov: bool) -> None:
    param = parameter(torch.float64)
    without = torch.nn.Parameter(rows(param, ORTHOGONALIZE))
    without.matrix_layout = PLAIN
    grads = gradients(torch.float64)
    train(muon([param], scalar_optimizer=scalar_optimizer, nesterov=nesterov), param, grads)
    train(muon([without], nesterov=nesterov), without, [rows(grad, ORTHOGONALIZE) for grad in grads])
    torch.testing.assert_close(rows(param, ORTHOGONALIZE), without.detach(), rtol=0, atol=1e-12)


def test_neighbours_in_the_group_do_not_notice() -> None:
    """Weights without scalar rows: the same update and the same state, with such a weight in their group or not."""
    alone, beside = (torch.nn.Parameter(torch.ones(6, 4, dtype=torch.float64)) for _ in range(2))
    mixed = parameter(torch.float64)
    one, two = muon([alone]), muon([mixed, beside])
    for grad in gradients(torch.float64, 5):
        alone.grad = beside.grad = grad[:6, :4].contiguous()
        mixed.grad = grad
        one.step()
        two.step()
    assert torch.equal(alone, beside)
    assert SECOND_MOMENT not in two.state[beside]


def test_the_gradient_is_left_as_it_was() -> None:
    param, grad = parameter(torch.float64), gradients(torch.float64, 1)[0]
    param.grad = grad.clone()
    muon([param]).step()
    assert torch.equal(param.grad, grad)


def test_resumed_run_continues_bitwise() -> None:
    """The bias correction of Adam needs the number of steps: it is in the state of the group."""
    grads = gradients(torch.float32, 12)
    whole, first = parameter(torch.float32), parameter(torch.float32)
    one, two = muon([whole]), muon([first])
    train(one, whole, grads)
    train(two, first, grads[:5])
    second = torch.nn.Parameter(first.detach().clone())
    second.matrix_layout = LAYOUT
    three = muon([second])
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    assert three.param_groups[0]["step"] == 5
    scheduler = torch.optim.lr_scheduler.LambdaLR(three, warm_up_and_cosine, last_epoch=4)
    for grad in grads[5:]:
        second.grad = grad
        three.step()
        scheduler.step()
    assert torch.equal(second, whole)


def test_a_checkpoint_of_earlier_groups_loads() -> None:
    """Groups saved before scalar rows existed lack their entries: they get those of the new optimizer."""
    param = parameter(torch.float32)
    optimizer = muon([param])
    train(optimizer, param, gradients(torch.float32, 3))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in [key for key in group if key.startswith("scalar_") or key == "step"]:
            del group[key]
    loaded = muon([parameter(torch.float32)])
    loaded.load_state_dict(state)
    group = loaded.param_groups[0]
    assert (group["scalar_lr_mult"], group["scalar_betas"], group["scalar_optimizer"]) == (LR_MULT, (0.8, 0.97), "adam")
    before = loaded.param_groups[0]["params"][0].detach().clone()
    loaded.param_groups[0]["params"][0].grad = gradients(torch.float32, 1)[0]
    loaded.step()
    assert not torch.equal(loaded.param_groups[0]["params"][0], before)


def test_a_state_of_the_whole_weight_is_cut_down() -> None:
    """As older versions kept it, with numbers in rows that nobody reads: the run goes on bit for bit."""
    grads = gradients(torch.float32, 6)
    param, again = parameter(torch.float32), parameter(torch.float32)
    optimizer, other = muon([param]), muon([again])
    train(optimizer, param, grads[:3])
    again.data.copy_(param)
    old = copy.deepcopy(optimizer.state_dict())
    second = torch.full_like(param, 7.0).detach()
    second[[section.rule == SCALAR for section in LAYOUT.sections for _ in range(section.rows)] * PERIODS] = (
        optimizer.state[param][SECOND_MOMENT].clone()
    )
    old["state"][0][SECOND_MOMENT] = second
    other.load_state_dict(old)
    assert torch.equal(other.state[again][SECOND_MOMENT], optimizer.state[param][SECOND_MOMENT])
    assert other.state[again][SECOND_MOMENT].untyped_storage().nbytes() == 9 * COLUMNS * 4
    train(optimizer, param, grads[3:])
    train(other, again, grads[3:])
    assert torch.equal(param, again)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_second_moment_in_the_shape_of_the_weight_and_back(stacked: bool) -> None:
    """What checkpoints have: each row in its place, zeros elsewhere."""
    param = parameter(torch.float32)
    if stacked:
        param = torch.nn.Parameter(torch.stack([param.detach(), -param.detach()]))
        param.matrix_layout = LAYOUT.stack()
    is_scalar = [section.rule == SCALAR for section in LAYOUT.sections for _ in range(section.rows)] * PERIODS
    kept = param.detach()[..., is_scalar, :].clone()
    whole = whole_second_moment(param, kept)
    assert torch.equal(whole, param.detach() * torch.tensor(is_scalar).float()[:, None])
    state = {SECOND_MOMENT: whole}
    cut_second_moment(param, state)
    assert torch.equal(state[SECOND_MOMENT], kept) and state[SECOND_MOMENT].is_contiguous()


def test_a_checkpoint_is_read_in_the_shape_of_the_weight() -> None:
    """Into a copy, of which the rows under Adam alone become state, in place: others may have been Adam's once."""
    param = parameter(torch.float32)
    optimizer = muon([param])
    train(optimizer, param, gradients(torch.float32, 2))
    held = ParamState(param, optimizer, optimizer.param_groups[0], param, None)
    kept = optimizer.state[param][SECOND_MOMENT]
    assert torch.equal(held.saved[SECOND_MOMENT], whole_second_moment(param, kept))
    held.saved[SECOND_MOMENT].copy_(param.detach())
    held.take()
    assert torch.equal(kept, rows(param, SCALAR)) and optimizer.state[param][SECOND_MOMENT] is kept
    assert torch.equal(held.saved[SECOND_MOMENT], whole_second_moment(param, kept))
    assert held.saved["momentum_buffer"] is optimizer.state[param]["momentum_buffer"]


def test_state_has_the_rows_alone() -> None:
    """Megatron-Core creates it before it loads."""
    param = parameter(torch.float32)
    optimizer = muon([param])
    optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
    state = dict(optimizer.state[param])
    assert state.pop("step") == 0, "a number, which Megatron-Core leaves out by its name"
    assert {name: tensor.shape for name, tensor in state.items()} == {
        "momentum_buffer": param.shape,
        PEAK: (ROWS, 1),
        SECOND_MOMENT: (PERIODS * 3, COLUMNS),
    }
    counted = state_bytes(optimizer).on_device
    assert counted == {"momentum_buffer": 4 * ROWS * COLUMNS, PEAK: 4 * ROWS, SECOND_MOMENT: 4 * PERIODS * 3 * COLUMNS}


def test_stack_of_experts() -> None:
    """A 3-D stack: the scalar rows of every expert."""
    one = parameter(torch.float64)
    stack = torch.nn.Parameter(torch.stack([one.detach(), 2 * one.detach()]))
    stack.matrix_layout = LAYOUT.stack()
    each = [torch.nn.Parameter(weight.clone()) for weight in stack.detach()]
    for param in each:
        param.matrix_layout = LAYOUT
    stacked, separate = muon([stack]), muon(each)
    for grad in gradients(torch.float64, 4):
        stack.grad = torch.stack([grad, -grad.flip(0)])
        for param, its_grad in zip(each, stack.grad, strict=True):
            param.grad = its_grad.clone()
        stacked.step()
        separate.step()
    torch.testing.assert_close(stack.detach(), torch.stack([param.detach() for param in each]), rtol=0, atol=1e-12)
