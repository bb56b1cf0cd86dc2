"""How numbers are kept between steps: every form against what it stands for, and steps in it against float32."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, Muon
from megatron_muon.optimizers.fading import EVERY
from megatron_muon.optimizers.forms import BFLOAT16, BLOCK, INT8
from megatron_muon.optimizers.matrices import Matrices
from megatron_muon.optimizers.stages import Variant
from megatron_muon.optimizers.storage import (
    REMAINDER,
    TIES,
    Kept,
    gradient_of,
    init_momentum,
    init_remainder,
    master_of,
    momentum_of,
    opened,
    read,
    write,
)
from megatron_muon.orthogonalize import iteration
from megatron_muon.routing.layout import SCALAR, MatrixLayout, Section
from tests.reference import orthogonalized


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
    params = optimizer.param_groups[0]["params"]
    return [read(master_of(param, optimizer.state[param])) for param in params]


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
    assert len(before) == len(SHAPES) and all(map(torch.equal, _masters(optimizer), before))
    assert not any("momentum_buffer" in state for state in optimizer.state.values())
    optimizer.forget()
    assert all(torch.equal(read(master_of(param, state)), param.float()) for param, state in optimizer.state.items())


def test_copies_are_exact() -> None:
    _, optimizer = _stepped(torch.bfloat16, torch.bfloat16, master="remainder", momentum_dtype="int8")
    copied = copy.deepcopy(optimizer)
    assert all(map(torch.equal, _masters(copied), _masters(optimizer)))


def _by_hand(state: dict[str, Any]) -> torch.Tensor:
    """Momentum in float64, decoded without the package's code."""
    buffer = state["momentum_buffer"].double()
    if "momentum_scale" in state:
        buffer = buffer * state["momentum_scale"].double().repeat_interleave(256, -1)[..., : buffer.size(-1)]
    return buffer


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_step_with_rounded_momentum(form: str, nesterov: bool) -> None:
    """Against the rule in float64: momentum is rounded when it is kept, and not before it is orthogonalized."""
    param = torch.nn.Parameter(torch.randn(12, 300, generator=torch.Generator().manual_seed(1)))
    optimizer = Muon(
        [param], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.0, fp32_matmul_prec="highest",
        scale_mode="none", momentum_dtype=form,
    )  # fmt: skip
    momentum = torch.zeros(12, 300, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        grad = torch.randn(12, 300, generator=generator)
        exact = momentum.lerp(grad.double(), 0.1)
        u = grad.double().lerp(exact, 0.9) if nesterov else exact
        before = param.detach().double()
        param.grad = grad
        optimizer.step()
        moved = (before - param.detach()) / 0.1
        expected = orthogonalized(u, iteration("quintic", 5).coefficients)
        torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5)
        momentum = _by_hand(optimizer.state[param])
        if form == "bf16":
            half_unit = exact.abs() * 2.0**-8
        else:
            blocks = [block.abs().amax(1, keepdim=True).expand_as(block) for block in exact.split(256, 1)]
            half_unit = torch.cat(blocks, 1) / 254
        assert ((momentum - exact).abs() <= half_unit * (1 + 1e-4)).all()


def test_every_momentum_dtype_has_its_bytes() -> None:
    params = _weights(torch.bfloat16)
    for form, own, each in (("fp32", torch.float32, 4), ("bf16", torch.bfloat16, 2), ("int8", torch.int8, 1)):
        for master, dtype in (("fp32", torch.float32), ("remainder", torch.bfloat16)):
            weight = torch.nn.Parameter(torch.zeros(32, 512, dtype=dtype), requires_grad=True)
            optimizer = Muon([weight], master=master, momentum_dtype=form)
            optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
            state = optimizer.state[weight]
            assert state["momentum_buffer"].dtype == own
            nbytes = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
            scales = 4 * 32 * 2 if form == "int8" else 0
            remainder = 32 * 512 * 17 // 8 if master == "remainder" else 0
            assert nbytes == 32 * 512 * each + scales + remainder + 4 * 32  # and the peak of each row
    plain = Muon(params)
    plain._init_group(plain.param_groups[0], skip_non_grad_params=False)
    kept = {state["momentum_buffer"].dtype for state in plain.state.values()}
    assert kept == {torch.bfloat16}, "without masters it has the weight's dtype"
    assert {state["momentum_peak"].dtype for state in plain.state.values()} == {torch.float32}


def _loaded(saved: dict[str, Any], dtype: torch.dtype, weights: list[torch.nn.Parameter], **options: Any) -> Muon:
    params = _weights(dtype)
    optimizer = Muon(params, lr=0.02, **options)
    for param, weight in zip(params, weights, strict=True):
        param.data.copy_(weight.detach())
    optimizer.load_state_dict(copy.deepcopy(saved))
    return optimizer


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_a_state_dict_is_loaded_with_all_its_bits(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    params, optimizer = _stepped(torch.bfloat16, torch.bfloat16, master="remainder", momentum_dtype=form)
    others = (
        _loaded(optimizer.state_dict(), torch.bfloat16, params, master="remainder", momentum_dtype=form),
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
    )
    for one in (optimizer, *others):
        for grads in _gradients(2, torch.bfloat16):
            for param, grad in zip(one.param_groups[0]["params"], grads, strict=True):
                param.grad = grad
            one.step()
    for other in others:
        assert all(map(torch.equal, _masters(other), _masters(optimizer)))
        for ours, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in ours)
    assert not capsys.readouterr().out, "nothing had another form"


@pytest.mark.parametrize(
    ("was", "now"), [("fp32", "bf16"), ("bf16", "int8"), ("int8", "fp32"), ("bf16", "fp32"), ("fp32", "int8")]
)
def test_momentum_of_another_form_is_kept_in_this_runs(was: str, now: str, capsys: pytest.CaptureFixture[str]) -> None:
    params, optimizer = _stepped(torch.float32, torch.float32, momentum_dtype=was)
    other = _loaded(optimizer.state_dict(), torch.float32, params, momentum_dtype=now)
    assert capsys.readouterr().out.splitlines() == [
        f"megatron_muon: 5 weights had momentum in {NAMES[was]}, which is kept in {NAMES[now]} from now on"
    ]
    for ours, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
        kept = _momentum(ours["momentum_buffer"].shape, now)
        write(kept, read(momentum_of(theirs)))
        assert all(map(torch.equal, momentum_of(ours).planes, kept.planes)) and momentum_of(ours).form is kept.form
    for param, grad in zip(other.state, next(_gradients(1, torch.float32)), strict=True):
        param.grad = grad
    other.step()
    assert not capsys.readouterr().out, "told once"


NAMES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def test_a_state_without_remainders_starts_from_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    wide, plain = _stepped(torch.float32, torch.float32)
    other = _loaded(plain.state_dict(), torch.bfloat16, wide, master="remainder")
    assert capsys.readouterr().out == (
        "megatron_muon: 5 weights had no master_remainder: their masters are the weights as they are\n"
    )
    assert all(map(torch.equal, _masters(other), [param.bfloat16().float() for param in wide]))
    assert all(state["momentum_buffer"].dtype == torch.float32 for state in other.state.values())
    for ours, theirs in zip(other.state.values(), plain.state.values(), strict=True):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    back = _loaded(other.state_dict(), torch.bfloat16, wide)
    assert "5 weights had a master_remainder, which is left out: the weights are kept in bfloat16 alone" in (
        capsys.readouterr().out
    )
    assert not any({REMAINDER, TIES} & state.keys() for state in back.state.values())


def test_masters_that_are_taken_away_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """With all state: it does not look like a weight that never had any."""
    params = [torch.nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))]
    optimizer = Muon(params, master="remainder")
    for told in (False, False, True):
        params[0].grad = torch.ones_like(params[0])
        if told:
            optimizer.state.clear()
        optimizer.step()
        assert ("had no master_remainder" in capsys.readouterr().out) is told


def test_a_gradient_of_a_run_before_gives_way() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    weight.decoupled_grad = torch.ones(4, 6)  # type: ignore[attr-defined]
    assert gradient_of(weight) is weight.decoupled_grad  # type: ignore[attr-defined]
    weight.grad = torch.zeros_like(weight)
    assert gradient_of(weight) is weight.grad


def test_hooks_of_others_see_a_state_dict_as_it_is() -> None:
    params, optimizer = _stepped(torch.bfloat16, torch.bfloat16, master="remainder")
    other, seen = Muon(_weights(torch.bfloat16), master="remainder"), []
    other.register_load_state_dict_pre_hook(lambda _, given: seen.append(given["state"][0]["momentum_buffer"]))
    other.register_load_state_dict_post_hook(lambda its: seen.append(next(iter(its.state.values()))["momentum_buffer"]))
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], optimizer.state[params[0]]["momentum_buffer"])


def test_a_weight_that_somebody_sets_to_zero_is_its_own_master() -> None:
    params, optimizer = _stepped(torch.bfloat16, torch.bfloat16, master="remainder")
    with torch.no_grad():
        for param in params:
            param[..., ::2] = 0.0
    for param, master in zip(params, _masters(optimizer), strict=True):
        assert master.isfinite().all()
        assert ((master - param.float()).abs() <= 2.0**-8 * param.float().abs() + 1e-40).all()


def test_forms_within_one_param_group() -> None:
    """Weights of both dtypes, each with gradients of either: each steps as it would alone."""
    params = [
        torch.nn.Parameter(torch.randn(16, 24, generator=torch.Generator().manual_seed(n)).bfloat16().to(dtype))
        for n, dtype in enumerate([torch.bfloat16, torch.float32, torch.bfloat16, torch.float32])
    ]
    grads = [torch.randn(16, 24, generator=torch.Generator().manual_seed(n + 9)).bfloat16() for n in range(4)]
    alone = []
    for param, grad in zip(params, grads, strict=True):
        own = torch.nn.Parameter(param.detach().float())
        own.grad = grad.float()
        Muon([own], lr=0.02).step()
        alone.append(own)
    for param, grad in zip(params[1:], grads[1:], strict=True):
        param.decoupled_grad = grad  # type: ignore[attr-defined]
    params[0].grad = grads[0]
    optimizer = Muon(params, lr=0.02, master="remainder")
    optimizer.step()
    assert all(map(torch.equal, _masters(optimizer), alone))


def test_a_variant_that_reads_rounded_weights_is_refused() -> None:
    class Clamped(Variant):
        name = "clamped"

        def retract(self, matrices: Matrices) -> None:
            for update in matrices.updates:
                torch._foreach_clamp_max_(update.params, 0.5)

    class Kept(Clamped):
        def retract(self, matrices: Matrices) -> None:
            for update in matrices.updates:
                update.keep(update.masters().clamp_max_(0.5))

    for variant in (Clamped, Kept):
        param = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16())
        param.grad = torch.ones_like(param)
        optimizer = Muon([param], variant=variant(), master="remainder")
        if variant is Kept:
            optimizer.step()
            assert _masters(optimizer)[0].max() == 0.5
        else:
            with pytest.raises(ConfigError, match="`params` with master remainder: these weights are rounded"):
                optimizer.step()


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_momentum_that_has_faded_is_forgotten_in_every_form(form: str) -> None:
    """Without gradients momentum falls by as much in every form, and is zero where float32's is."""
    found = {}
    for own in ("fp32", form):
        param = torch.nn.Parameter(torch.randn(6, 300, generator=torch.Generator().manual_seed(1)))
        optimizer = Muon([param], lr=1e-3, momentum=0.8, weight_decay=0.0, momentum_dtype=own)
        still = []
        for step in range(5 * EVERY):
            grad = torch.randn(6, 300, generator=torch.Generator().manual_seed(step))
            grad[3:] *= step < EVERY + 5
            param.grad = grad
            optimizer.step()
            still.append(read(momentum_of(optimizer.state[param])).any(1))
        found[own] = torch.stack(still)
    assert torch.equal(found[form], found["fp32"])
    assert found[form][-1].tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_rows_under_adam_in_another_form(form: str) -> None:
    """The first moment is rounded when it is kept, and zeroed with a second moment that somebody has emptied."""
    param = torch.nn.Parameter(torch.randn(16, 20, generator=torch.Generator().manual_seed(1)))
    param.matrix_layout = MIXED  # type: ignore[attr-defined]
    optimizer = Muon([param], lr=0.01, weight_decay=0.1, momentum_dtype=form, master="remainder")
    own = torch.nn.Parameter(param.detach()[[6, 7, 14, 15]].clone())
    adam = torch.optim.AdamW([own], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        param.grad = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
        own.grad = param.grad[[6, 7, 14, 15]].clone()
        optimizer.step()
        adam.step()
        kept = _momentum((4, 20), form)
        write(kept, adam.state[own]["exp_avg"])
        adam.state[own]["exp_avg"].copy_(read(kept))
        assert torch.equal(param[[6, 7, 14, 15]], own), step
    optimizer.state[param]["exp_avg_sq"].zero_()
    optimizer.step()
    fresh = 0.1 * param.grad[[6, 7, 14, 15]]
    found = read(momentum_of(optimizer.state[param]))[[6, 7, 14, 15]]
    assert ((found - fresh).abs() <= fresh.abs().amax(1, keepdim=True) / 127).all()


@pytest.mark.parametrize("variant", ["normuon", "namo", "adamuon"])
def test_another_variants_state_is_told(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    params, plain = _stepped(torch.float32, torch.float32)
    other = _loaded(plain.state_dict(), torch.float32, params, variant=variant)
    assert "megatron_muon: 5 weights had no " in (told := capsys.readouterr().out) and "begins at zero" in told
    for param, grad in zip(other.state, next(_gradients(1, torch.float32)), strict=True):
        param.grad = grad
    other.step()
    _loaded(other.state_dict(), torch.float32, params, variant=variant)
    assert not capsys.readouterr().out, "it is there now"
    back = _loaded(other.state_dict(), torch.float32, params)
    assert re.fullmatch(r"megatron_muon: 5 weights had \w+ of another variant, .* out\n", capsys.readouterr().out)
    assert all(state.keys() == its.keys() for state, its in zip(back.state.values(), plain.state.values(), strict=True))
