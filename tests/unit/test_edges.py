"""Muon in a loop of one's own, at its edges: schedules, rate 0, groups and weights that are not Muon's, copies.

What other packages, torch's schedulers and torch.distributed.checkpoint do to an optimizer.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from megatron_muon import Muon, MuonConfig, param_groups
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.rates import PEAK_RATE, options_of
from megatron_muon.orthogonalize import switches
from megatron_muon.orthogonalize.switches import matmul_precision
from megatron_muon.routing.layout import SCALAR, STIEFEL, MatrixLayout, Section

GATED = MatrixLayout("in_proj", (Section("qkv", 6), Section("gates", 2, SCALAR)))
ON_MANIFOLD = MatrixLayout("whole", direction=STIEFEL)
VARIANTS: dict[str, tuple[MatrixLayout | None, dict[str, Any]]] = {
    "decoupled": (None, {}),
    "independent": (None, {"weight_decay_method": "independent"}),
    "cautious": (None, {"weight_decay_method": "cautious"}),
    "rows under Adam": (GATED, {}),
    "rows under Lion": (GATED, {"scalar_optimizer": "lion"}),
    "Hyperball": (None, {"variant": "hyperball", "scale_mode": "none"}),
    "sphere": (None, {"variant": "spectral_sphere"}),
    "Stiefel": (ON_MANIFOLD, {"variant": "stiefel"}),
    "sign": (MatrixLayout("whole", direction="sign"), {}),
}


def parameter(rows: int = 8, columns: int = 6, seed: int = 0, layout: MatrixLayout | None = None) -> torch.nn.Parameter:
    found = torch.nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    if layout is not None:
        found.matrix_layout = layout  # type: ignore[attr-defined]
    return found


def with_gradient(param: torch.nn.Parameter, seed: int) -> torch.nn.Parameter:
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 + seed))
    return param


def factors(optimizer: Muon, steps: int, between: Callable[[int], Any]) -> list[float]:
    """By what a weight is multiplied in each step, which has a gradient of zeros."""
    param, found = optimizer.param_groups[0]["params"][0], []
    for number in range(steps):
        param.data.fill_(1.0)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        found.append(param.detach().mean().item())
        between(number)
    return found


def scheduled(rate: Any, **group: Any) -> Muon:
    return Muon(
        [{"params": [parameter()], **group}], lr=rate, weight_decay=0.01, weight_decay_method="independent_scheduled"
    )


def by_hand(optimizer: Muon) -> Callable[[int], None]:
    def set_rate(number: int) -> None:
        optimizer.param_groups[0]["lr"] = (1e-3, 2e-2, 1e-2)[number % 3]

    return set_rate


SCHEDULES: dict[str, Callable[[Muon], Callable[..., Any]]] = {
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 2e-2, step_size_up=2).step,
    "LambdaLR above 1": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 + step).step,
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 3.0).step,
    "SWALR": lambda o: SWALR(o, swa_lr=0.5, anneal_epochs=2).step,
    "by hand": by_hand,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decay_that_follows_the_schedule_never_exceeds_itself(schedule: str) -> None:
    """At rates above the first one it turned weights: factors of -0.337, and of -1."""
    optimizer = scheduled(1e-3)
    step = SCHEDULES[schedule](optimizer)
    found = factors(optimizer, 6, lambda number: step(number) if schedule == "by hand" else step())
    assert all(0.99 - 1e-6 <= each <= 1.0 for each in found), found
    assert min(found) == pytest.approx(0.99, abs=1e-6)


@pytest.mark.parametrize("given", [{PEAK_RATE: 2e-2}, {"lr": 2e-2}])
def test_the_peak_that_is_given_counts_from_the_first_step(given: dict[str, float]) -> None:
    optimizer = scheduled(1e-3, **given)
    cycle = lr_scheduler.CyclicLR(optimizer, 1e-4, 2e-2, step_size_up=3)
    expected = [1 - 0.01 * rate / 2e-2 for rate in (1e-4, 1e-4 + 0.0199 / 3, 1e-4 + 2 * 0.0199 / 3, 2e-2)]
    assert factors(optimizer, 4, lambda _: cycle.step()) == pytest.approx(expected, abs=1e-6)


def test_a_rate_that_is_filled_in_place_and_a_resumed_peak() -> None:
    rate = torch.tensor(0.0)  # where a warm-up begins: division by this peak gave infinite weights
    optimizer = scheduled(rate)
    rates = (0.02, 0.01, 0.001, 0.0)
    found = factors(optimizer, 5, lambda number: rate.fill_(rates[number % 4]))
    assert found == pytest.approx([1.0, 0.99, 0.995, 0.9995, 1.0], abs=1e-6)
    other = scheduled(1e-3)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"] = 0.005
    assert factors(other, 1, lambda _: None) == pytest.approx([0.9975], abs=1e-6)


def test_rates_of_a_gpu_are_not_read_and_what_would_turn_weights_becomes_nan() -> None:
    """On the device "meta", from which nobody can read; the numbers themselves on the CPU."""
    for method in ("decoupled", "independent", "independent_scheduled", "cautious"):
        param = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
        rates = {"lr": torch.empty(1, device="meta"), "weight_decay": torch.empty((), device="meta")}
        group = {"params": [param], "momentum": 0.9, "damping_depth": 0.0, **rates}
        options = options_of(group, MuonConfig(weight_decay_method=method), True, torch.empty((), device="meta"))
        kept = options.cautious if method == "cautious" else options.kept
        assert isinstance(kept, torch.Tensor) and kept.shape == () and not options.is_still


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 3.0, "weight_decay": 0.5}, "weight_decay 0.5 with lr 3 and weight_decay_method decoupled: .*by -0.5"),
        ({"lr": 3.0, "weight_decay": 0.5, "weight_decay_method": "cautious"}, "method cautious: .*by -0.5"),
        ({"weight_decay": 1.5, "weight_decay_method": "independent"}, "method independent: .*by -0.5"),
        ({"lr": torch.tensor(3.0), "weight_decay": torch.tensor([0.5])}, "method decoupled: .*by -0.5"),
        ({"lr": 0.1, "weight_decay": 0.5, "scalar_lr_mult": 30.0}, "rows under adam: .*by -0.5"),
    ],
)
def test_decay_that_would_turn_weights_stops_before_anything_moves(options: dict[str, Any], message: str) -> None:
    param = with_gradient(parameter(layout=GATED), 0)
    before = param.detach().clone()
    optimizer = Muon([param], **options)
    with pytest.raises(ConfigError, match=message):
        optimizer.step()
    assert torch.equal(param, before) and not optimizer.state


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_at_rate_0_changes_no_bit_of_a_weight(name: str) -> None:
    """Not the sign of a zero, nor where gradients are infinite; momentum goes on."""
    layout, options = VARIANTS[name]
    for kind in ("number", "tensor"):
        param = parameter(layout=layout)
        param.data[0, 0] = -0.0
        optimizer = Muon([with_gradient(param, 0)], lr=0.0 if kind == "number" else torch.tensor(0.0), **options)
        for step in range(2):
            before = param.detach().clone()
            optimizer.step()
            assert torch.equal(param.detach().view(torch.int32), before.view(torch.int32)), step
            optimizer.param_groups[0]["lr"] = 0.02
            optimizer.step()
            assert not torch.equal(param.detach(), before)
            optimizer.param_groups[0]["lr"] = 0.0
        assert optimizer.param_groups[0]["step"] == 4 and optimizer.state[param]["momentum_buffer"].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_state_of_torch_distributed_checkpoint(name: str) -> None:
    """It makes state by a step at rate 0 with gradients of zeros, on saving a new optimizer and on loading."""
    layout, options = VARIANTS[name]

    def made() -> tuple[torch.nn.Module, Muon]:
        model = torch.nn.Linear(6, 8, bias=False)
        model.weight = parameter(layout=layout)
        return model, Muon(model.parameters(), lr=0.02, weight_decay=0.1, **options)

    model, optimizer = made()
    for step in range(3):
        with_gradient(model.weight, step)
        optimizer.step()
    other, fresh = made()
    other.load_state_dict(model.state_dict())
    get_optimizer_state_dict(other, fresh)
    assert fresh.param_groups[0]["step"] == 0 == fresh.state[other.weight].get("step", 0)
    set_optimizer_state_dict(other, fresh, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    assert torch.equal(other.weight, model.weight) and fresh.param_groups[0]["step"] == 3
    for param, its in ((model.weight, optimizer), (other.weight, fresh)):
        with_gradient(param, 9)
        its.step()
    torch.testing.assert_close(other.weight, model.weight, rtol=0, atol=1e-6 if name == "sphere" else 0)


@pytest.mark.parametrize("variant", ["none", "spectral_sphere", "normuon"])
def test_state_that_is_asked_for_changes_no_bit_of_later_steps(variant: str) -> None:
    """Nor what power iterations start from, where they do not converge in a step."""
    found = []
    for asks in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 24, bias=False)
        optimizer = Muon(model.parameters(), lr=0.02, weight_decay=0.1, variant=variant)
        if asks:
            get_optimizer_state_dict(model, optimizer)
        for step in range(3):
            with_gradient(model.weight, step)
            optimizer.step()
        found.append(model.weight.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"use_muon": False}, "use_muon False in a param group: .*torch.optim.AdamW"),
        ({"algorithm": "adamw"}, "algorithm 'adamw' in a param group"),
        ({"optim_type": "adam"}, "optim_type 'adam' in a param group"),
        ({"kind": "adamw"}, "kind 'adamw' in a param group"),
        ({"optimizer": "adam"}, "optimizer 'adam' in a param group"),
        ({"eps": 1e-7}, "eps in a param group: it is an option of the whole optimizer"),
        ({"ns_steps": 5}, r"ns_steps in a param group: .*did you mean num_ns_steps"),
        ({"betas": (0.9, 0.95)}, "betas in a param group: there is no such option"),
    ],
)
def test_groups_of_other_packages(group: dict[str, Any], message: str) -> None:
    """What marks a group as Muon's is understood; what marks it as another's, or would do nothing, is refused."""
    with pytest.raises(ConfigError, match=message):
        Muon([{"params": [parameter()], **group}])
    mark, own = next(iter(group)), {"use_muon": True}
    if mark in ("use_muon", "algorithm", "optim_type", "kind", "eps"):  # edited later
        marked = {name: own.get(name, "muon") for name in group} if mark != "eps" else {}
        optimizer = Muon([{"params": [with_gradient(parameter(), 0)], **marked}])
        optimizer.step()
        optimizer.param_groups[0].update(group)
        with pytest.raises(ConfigError, match=message):
            optimizer.step()


def test_options_of_a_group_act() -> None:
    """Each as if it were the whole optimizer's."""
    changes = {"nesterov": not MuonConfig.nesterov, "scale_mode": "moonlight", "extra_scale_factor": 3.0, "lr": 0.5}
    for name, value in changes.items():
        of_group, of_all, usual = (with_gradient(parameter(), 0) for _ in range(3))
        optimizers = [Muon([{"params": [of_group], name: value}]), Muon([of_all], **{name: value}), Muon([usual])]
        for step in (1, 2):
            for param, optimizer in zip((of_group, of_all, usual), optimizers, strict=True):
                optimizer.step()
                with_gradient(param, step)
        assert torch.equal(of_group, of_all) and not torch.equal(of_group, usual), name


def test_state_of_torchs_own_muon_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    param = with_gradient(parameter(), 0)
    theirs = torch.optim.Muon([param], lr=0.03, momentum=0.9)
    theirs.step()
    optimizer = Muon([param])
    optimizer.load_state_dict(theirs.state_dict())
    assert "had adjust_lr_fn, eps, ns_coefficients, ns_steps in their param group" in capsys.readouterr().out
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.03, 0.9) and "ns_steps" not in group
    assert torch.equal(optimizer.state[param]["momentum_buffer"], theirs.state[param]["momentum_buffer"])
    optimizer.step()


def test_state_of_adamw_is_refused_before_anything_changes() -> None:
    """It was kept beside a momentum of zeros, with AdamW's options in the groups."""
    param = with_gradient(parameter(), 0)
    theirs = torch.optim.AdamW([param], lr=0.03)
    theirs.step()
    optimizer = Muon([("layers.1", param)])
    with pytest.raises(ValueError, match=r"layers\.1: its state has exp_avg, exp_avg_sq, step, and no momentum_buffer"):
        optimizer.load_state_dict(theirs.state_dict())
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 1e-3


def test_state_goes_to_the_weight_of_its_name_whatever_the_order() -> None:
    """It went to the weights in their order, or failed in the step that came next."""
    weights = {name: with_gradient(parameter(), number) for number, name in enumerate(("a", "b"))}
    optimizer = Muon([("module._orig_mod.a", weights["a"]), ("module._orig_mod.b", weights["b"])])
    optimizer.step()
    turned = Muon([("b", weights["b"]), ("a", weights["a"])])
    turned.load_state_dict(optimizer.state_dict())
    assert turned.param_groups[0]["param_names"] == ["b", "a"]
    for weight in weights.values():
        assert torch.equal(turned.state[weight]["momentum_buffer"], optimizer.state[weight]["momentum_buffer"])
    with pytest.raises(ValueError, match="c: no weight of that name is in the saved state, which has a"):
        Muon([("a", weights["a"]), ("c", weights["b"])]).load_state_dict(optimizer.state_dict())
    other = torch.nn.Parameter(torch.zeros(6, 8))
    with pytest.raises(ValueError, match="its momentum_buffer has shape 8 x 6, and the weight 6 x 8"):
        Muon([other, weights["b"]]).load_state_dict(optimizer.state_dict())


def test_torch_distributed_checkpoint_puts_state_in_order_by_itself() -> None:
    models = [torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2))) for _ in range(2)]
    optimizers = [
        Muon(named) for named in (list(models[0].named_parameters()), list(models[1].named_parameters())[::-1])
    ]
    for number, weight in enumerate(models[0].parameters()):
        with_gradient(weight, number)
    optimizers[0].step()
    set_optimizer_state_dict(models[1], optimizers[1], get_optimizer_state_dict(models[0], optimizers[0]))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        found, expected = optimizers[1].state[other], optimizers[0].state[one]
        assert torch.equal(found["momentum_buffer"], expected["momentum_buffer"])
    assert optimizers[1].param_groups[0]["param_names"] == ["1.weight", "0.weight"]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(1, 6).expand(4, 6), "layers.1: a weight of 4 x 6 is a view that repeats its numbers"),
        (torch.zeros(4, 6).to_sparse(), "layers.1: a weight of 4 x 6 is sparse"),
        (torch.zeros(4, 6, dtype=torch.complex64), "layers.1: a weight of 4 x 6 is of torch.complex64"),
        (torch.zeros(24), "layers.1: a weight has shape 24, and .*FSDP1.*ZeRO"),
        (torch.zeros(0), "layers.1: a weight has shape 0, and .*FSDP1"),
        (torch.zeros(2, 3, 4), "layers.1: a weight has shape 2 x 3 x 4, and Muon updates 2-D weights: give it to Adam"),
    ],
)
def test_weights_that_cannot_be_updated_are_named(weight: torch.Tensor, message: str) -> None:
    named = [("layers.0", parameter()), ("layers.1", torch.nn.Parameter(weight))]
    with pytest.raises(ConfigError, match=message):
        Muon(named)


def test_gradients_and_memory_that_cannot_be_updated_are_refused_before_anything_moves() -> None:
    """A sparse gradient failed in torch's words, some after others had moved; weights may be flattened later."""
    first, second = with_gradient(parameter(), 0), with_gradient(parameter(), 1)
    optimizer = Muon([("first", first), ("second", second)])
    before = first.detach().clone()
    dense = second.grad
    assert dense is not None
    second.grad = dense.to_sparse()
    with pytest.raises(ConfigError, match="second has a sparse gradient"):
        optimizer.step()
    second.grad, second.data = None, torch.zeros(8, 6, dtype=torch.complex64)
    with pytest.raises(ConfigError, match=r"second is of torch\.complex64"):
        optimizer.step()
    second.data = torch.zeros(24)
    with pytest.raises(ConfigError, match=r"second has shape 24, and .*FSDP1"):
        optimizer.step()
    assert torch.equal(first, before) and not optimizer.state


@pytest.mark.parametrize(
    "number", [float("nan"), float("inf"), True, torch.tensor(float("nan")), torch.tensor([0.1, 0.2])]
)
@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum"])
def test_numbers_that_are_none_are_refused_when_given_and_later(name: str, number: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} .*: give a"):
        Muon([parameter()], **{name: number})
    param = with_gradient(parameter(), 0)
    before = param.detach().clone()
    optimizer = Muon([param])
    optimizer.param_groups[0][name] = number
    with pytest.raises(ConfigError, match=f"^{name} .*: give a"):
        optimizer.step()
    assert torch.equal(param, before) and not optimizer.state


@pytest.mark.parametrize("options", [{}, {"weight_decay_method": "l2"}, {"scalar_optimizer": "lion"}])
def test_rates_may_be_tensors_of_shape_1(options: dict[str, Any]) -> None:
    """As in torch; rows under the scalar optimizer, too."""
    found = []
    for make in (float, lambda value: torch.tensor([value], dtype=torch.float64)):
        param = parameter(layout=GATED)
        optimizer = Muon([param], lr=make(0.05), weight_decay=make(0.1), **options)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - 0.3 * step)
        for step in range(3):
            with_gradient(param, step)
            optimizer.step()
            schedule.step()
        found.append(param.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_arguments_after_lr_have_names() -> None:
    """``Muon(params, 0.02, 0.1)`` is momentum in some packages, and decay in others."""
    with pytest.raises(TypeError, match="positional"):
        Muon([parameter()], 0.02, 0.1)  # type: ignore[misc]
    assert Muon([parameter()], 0.02).defaults["lr"] == 0.02


@pytest.mark.parametrize("name", ["decoupled", "rows under Adam", "sphere", "Hyperball"])
def test_copies_go_on_bit_by_bit(name: str) -> None:
    """As torch's own tests of optimizers: deterministic, by state dict, deepcopy, pickle, torch.save; no new keys."""
    layout, options = VARIANTS[name]

    def trained(first: int, model: torch.nn.ParameterList, optimizer: Muon) -> torch.Tensor:
        for step in range(first, first + 3):
            with_gradient(model[0], step)
            optimizer.step()
        return model[0].detach().clone()

    def made() -> tuple[torch.nn.ParameterList, Muon]:
        model = torch.nn.ParameterList([parameter(layout=layout)])
        return model, Muon(model.named_parameters(), lr=0.03, **options)

    model, optimizer = made()
    start = trained(0, model, optimizer)
    assert torch.equal(start, trained(0, *made()))
    saved, keys = copy.deepcopy(optimizer.state_dict()), set(optimizer.state_dict()["param_groups"][0])
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for through_file in (False, True):
        other, its = made()
        other[0].data.copy_(start)
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        its.load_state_dict(torch.load(file, weights_only=True) if through_file else saved)
        copies.append((other, its))
    expected = trained(3, model, optimizer)
    for other, its in copies:
        assert set(its.state_dict()["param_groups"][0]) == keys
        torch.testing.assert_close(trained(3, other, its), expected, rtol=0, atol=1e-6 if name == "sphere" else 0)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        Muon([{"params": [parameter()]}, {"params": [parameter()]}]).load_state_dict(saved)


def test_threads_that_step_at_once_leave_the_precision_of_products() -> None:
    """The second found what the first had set, and put that back; none gets less than it asks for."""
    matmul, entered, first_left, found = torch.backends.cuda.matmul, threading.Event(), threading.Event(), list[str]()

    def second() -> None:
        with matmul_precision("high"):
            entered.set()
            first_left.wait(10)
            found.append(matmul.fp32_precision)

    before, thread = matmul.fp32_precision, threading.Thread(target=second)
    with matmul_precision("highest"):
        thread.start()
        entered.wait(10)
        assert matmul.fp32_precision == "ieee"
    first_left.set()
    thread.join()
    assert found == ["tf32"] and matmul.fp32_precision == before


def test_switches_that_fail_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later caller found that of the one that failed, and products stayed as exact as that had asked for."""
    monkeypatch.setattr(switches, "_set", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), matmul_precision("highest"):
        pass
    monkeypatch.undo()
    with matmul_precision("high"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_options_of_the_optimizer_are_no_options_of_routing() -> None:
    with pytest.raises(ConfigError, match=r"num_ns_steps 7 in the options of param_groups.*num_ns_steps=7"):
        param_groups(torch.nn.Linear(4, 4), MuonConfig(num_ns_steps=7))
