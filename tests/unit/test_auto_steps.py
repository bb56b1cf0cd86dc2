"""Steps of Newton-Schulz that are measured: what is chosen, when, and what carries it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.choices import Budget
from megatron_muon.config import MuonConfig
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.auto_steps import MEASURED_IN, TOLERANCE
from megatron_muon.optimizers.graph import capture
from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.orthogonalize.defect import defect, random_defect, singular_values
from megatron_muon.orthogonalize.newton_schulz import newton_schulz
from megatron_muon.routing import annotate
from megatron_muon.routing.layout import WHOLE, layout_of
from tests.recorded import recorded

P = 96


def matrix(s: torch.Tensor, columns: int = P) -> torch.Tensor:
    """Of these singular values, float64."""
    generator = torch.Generator().manual_seed(7)
    sides = (torch.randn(n, s.numel(), generator=generator, dtype=torch.float64) for n in (s.numel(), columns))
    u, v = (torch.linalg.qr(side)[0] for side in sides)
    return (u * s) @ v.mT


def left(x: torch.Tensor, name: str, steps: int) -> float:
    """The defect of what the iteration itself makes of x."""
    return float((torch.linalg.svdvals(newton_schulz(x, iteration(name, steps))) - 1.0).square().mean().sqrt())


SPECTRA: dict[str, torch.Tensor] = {
    "flat": matrix(torch.ones(P, dtype=torch.float64), 2 * P),
    "random": torch.randn(2 * P, 2 * P, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    "steep": matrix(torch.arange(1, P + 1, dtype=torch.float64) ** -1.5),
}


@pytest.mark.parametrize("name", ["quintic", "cubic5", "polar_express", "turbo_muon"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_tell_what_the_iteration_does(name: str, spectrum: str) -> None:
    x = SPECTRA[spectrum]
    for scale in (1.0, 1e-30):
        s = singular_values((x * scale).float().mT, name == "turbo_muon")
        for steps in (3, 5, 8):
            wanted = left((x * scale).float().double().mT, name, steps)
            assert defect(s, iteration(name, steps)) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_random_matrices_are_those_of_the_quarter_circle() -> None:
    x = torch.randn(600, 600, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in ("quintic", "polar_express", "turbo_muon"):
        found = defect(singular_values(x, name == "turbo_muon"), iteration(name, 4))
        assert random_defect(600, iteration(name, 4)) == pytest.approx(found, rel=0.02)


def auto(name: str) -> Budget:
    return Budget("auto", measured=name)


GRADS: list[tuple[str, torch.Tensor]] = [
    ("two", SPECTRA["random"].float()),
    ("two", SPECTRA["steep"].float()),
    ("flat", SPECTRA["flat"].float()),
    ("zeros", torch.zeros(8, 6)),
]


def built(**options: object) -> Muon:
    """A class of two weights, of which the steep one decides, and one of a flat weight, one of zeros."""
    params = []
    for number, (name, grad) in enumerate(GRADS):
        start = torch.randn(grad.shape, generator=torch.Generator().manual_seed(number))
        param = torch.nn.Parameter(start)
        param.matrix_layout = replace(WHOLE, budget=auto(name))
        params.append(param)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.02}]
    return Muon(groups, lr=0.01, fp32_matmul_prec="highest", **options)


def train(optimizer: Muon, numbers: range, at: Callable[[int], None] = lambda number: None) -> None:
    """Steps of these numbers; gradients come into the same memory, and are those of the step."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number in numbers:
        for group in optimizer.param_groups:
            group["step"] = number - 1
        for param, (_, grad) in zip(params, GRADS, strict=True):
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
            param.grad.copy_(grad).mul_(1.0 + 0.01 * number)
        optimizer.step()
        at(number)


def same(first: Muon, second: Muon) -> bool:
    pairs = zip(*([p for group in each.param_groups for p in group["params"]] for each in (first, second)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def steps_of(optimizer: Muon) -> dict[str, int]:
    found = [dict(group["auto_steps"]) for group in optimizer.param_groups]
    assert all(each == found[0] for each in found)
    return {name.partition(", where others take")[0]: steps for name, steps in found[0].items()}


LAST = MEASURED_IN + 2


def test_fewest_steps_that_are_enough_for_all_matrices_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("quintic", "simple"):
        optimizer = built(coefficient_type=name)
        train(optimizer, range(MEASURED_IN - 1, MEASURED_IN + 1))
        wanted = {"zeros": 5}
        for kind, grads in (("two", [GRADS[0][1], GRADS[1][1]]), ("flat", [GRADS[2][1]])):
            enough = (
                steps
                for steps in range(1, 11)
                if all(
                    left(x.double(), name, steps) <= TOLERANCE * random_defect(min(x.shape), iteration(name, 5))
                    for x in grads
                )
            )
            wanted[kind] = next(enough)
        assert steps_of(optimizer) == wanted
        assert wanted["flat"] < wanted["two"] and wanted["two"] > 5, wanted
    told = capsys.readouterr().out
    assert re.search(
        r"\n  flat: 2 steps, \d+% of the operations; stable rank 96 .. 96; worst defect 0.\d\d times", told
    )
    assert "\n  zeros: 5 steps, as all: it has had no gradients\n" in told


def test_random_matrices_get_the_own_number() -> None:
    for name in ("quintic", "simple", "polar_express"):
        param = torch.nn.Parameter(torch.zeros(512, 512))
        param.matrix_layout = replace(WHOLE, budget=auto("random"))
        param.grad = torch.randn(512, 512, generator=torch.Generator().manual_seed(2))
        optimizer = Muon([param], coefficient_type=name)
        optimizer.param_groups[0]["step"] = MEASURED_IN - 1
        optimizer.step()
        assert steps_of(optimizer) == {"random": 5}


@pytest.mark.parametrize("name", ["quintic", "polar_express", "turbo_muon"])
@pytest.mark.parametrize("p", [2, 3, 4])
def test_small_matrices_do_not_get_next_to_no_steps(p: int, name: str) -> None:
    """The quarter circle reaches beyond 1 at these sizes, where the polynomials diverge, so that any step would do."""
    x = torch.zeros(p, 64, dtype=torch.float64)
    x.diagonal().copy_(0.05 ** torch.linspace(0, 1, p, dtype=torch.float64))
    usual = random_defect(p, iteration(name, 5))
    assert 0.0 < usual < 0.2 and defect(singular_values(x), iteration(name, 1)) > TOLERANCE * usual


def test_numbers_hold_for_what_they_were_measured_for() -> None:
    optimizer, other = built(), built(coefficient_type="polar_express")
    train(optimizer, range(MEASURED_IN, MEASURED_IN + 1))
    fresh = built(coefficient_type="polar_express")
    train(fresh, range(MEASURED_IN, MEASURED_IN + 1))
    assert steps_of(fresh) != steps_of(optimizer)
    other.load_state_dict(optimizer.state_dict())
    train(other, range(MEASURED_IN, MEASURED_IN + 1))
    assert steps_of(other) == steps_of(fresh)


def test_steps_before_are_as_without_and_those_after_as_if_they_had_been_given() -> None:
    measured, given = built(), built()
    for param in (param for group in given.param_groups for param in group["params"]):
        param.matrix_layout = WHOLE
    train(measured, range(MEASURED_IN - 2, MEASURED_IN))
    train(given, range(MEASURED_IN - 2, MEASURED_IN))
    assert same(measured, given) and not any("auto_steps" in group for group in measured.param_groups)
    train(measured, range(MEASURED_IN, LAST))
    for param, (name, _) in zip((p for group in given.param_groups for p in group["params"]), GRADS, strict=True):
        param.matrix_layout = replace(WHOLE, budget=Budget(steps_of(measured)[name]))
    train(given, range(MEASURED_IN, LAST))
    assert same(measured, given)


@pytest.mark.parametrize("at", [MEASURED_IN - 1, MEASURED_IN, MEASURED_IN + 1])
def test_resumed_and_copied(at: int) -> None:
    """Saved after the step before the measurement, after that step, and later."""
    whole = built()
    others: list[Muon] = []

    def leave(number: int) -> None:
        if number == at:
            others.append(built())
            for mine, its in zip(others[0].param_groups, whole.param_groups, strict=True):
                torch._foreach_copy_([p.data for p in mine["params"]], [p.data for p in its["params"]])
            others[0].load_state_dict(copy.deepcopy(whole.state_dict()))
            others.append(copy.deepcopy(whole))

    train(whole, range(MEASURED_IN - 1, LAST + 1), leave)
    for other in others:
        train(other, range(at + 1, LAST + 1))
        assert same(whole, other) and steps_of(other) == steps_of(whole)


def test_reset_measures_anew() -> None:
    optimizer = built()
    train(optimizer, range(MEASURED_IN, LAST))
    optimizer.reset()
    fresh = copy.deepcopy(optimizer)
    for param in (param for group in fresh.param_groups for param in group["params"]):
        param.matrix_layout = WHOLE
    train(optimizer, range(1, 2))
    train(fresh, range(1, 2))
    assert same(optimizer, fresh)
    assert all(layout_of(p).budget == Budget("auto") for group in optimizer.param_groups for p in group["params"])


def test_a_captured_step_is_captured_anew() -> None:
    """Measured in the third replay: steps that differ are taken without the graph until there is another."""
    captured, anew = (built(ns_backend="torch") for _ in range(2))  # oneDNN's are done again without its permission
    graph = capture(captured, 2, how=recorded())
    capture(anew, 10**9, how=recorded())
    is_captured: list[bool] = []
    train(captured, range(MEASURED_IN - 4, MEASURED_IN + 7), lambda number: is_captured.append(graph.is_captured))
    train(anew, range(MEASURED_IN - 4, MEASURED_IN + 7))
    assert is_captured[3] and not is_captured[4] and is_captured[-1]
    assert same(captured, anew)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(4, 8, False)}) for _ in range(3))


def test_classes_are_operators_in_the_layers_of_a_rule() -> None:
    net = Net()
    annotate(net, MuonConfig(param_rule=("*=steps:auto", "*.2.*=steps:auto", "*.1.*=steps:7")))
    budgets = [layout_of(layer["up"].weight).budget for layer in net.layers]
    assert [budget.measured for budget in budgets] == ["layers.*.up.weight (*)", "", "layers.*.up.weight (*.2.*)"]
    assert budgets[0] == budgets[2] == Budget("auto") and budgets[1] == Budget(7)


def test_refused() -> None:
    param = torch.nn.Parameter(torch.zeros(4, 6))
    param.matrix_layout = replace(WHOLE, budget=Budget("auto"))
    with pytest.raises(ConfigError, match=r"steps:auto',\) \(a whole weight\) with no name of its class"):
        Muon([param])
    param.matrix_layout = replace(WHOLE, budget=auto("a"))
    with pytest.raises(
        ConfigError, match=r"steps:auto',\) \(a whole weight\) with spectral_sphere, which iterates more"
    ):
        Muon([param], variant="spectral_sphere")


def test_what_a_variant_makes_of_the_momentum_is_measured() -> None:
    """AdaMuon iterates signs: those of random columns, however small some are, are a random matrix."""
    found = []
    for variant in ("none", "adamuon"):
        param = torch.nn.Parameter(torch.zeros(64, 64))
        param.matrix_layout = replace(WHOLE, budget=auto("columns"))
        param.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(4)) * 0.5 ** torch.arange(64.0)
        optimizer = Muon([param], variant=variant, fp32_matmul_prec="highest")
        optimizer.param_groups[0]["step"] = MEASURED_IN - 1
        optimizer.step()
        found.append(steps_of(optimizer)["columns"])
    assert found == [10, 5]


def test_it_is_the_momentum_of_the_step_that_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """With this step's gradient in it, mixed as Nesterov's, and weight decay of method l2."""
    param = torch.nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    param.matrix_layout = replace(WHOLE, budget=auto("one"))
    optimizer = Muon([param], momentum=0.8, nesterov=True, weight_decay=0.5, weight_decay_method="l2")
    for number in range(MEASURED_IN - 2, MEASURED_IN + 1):
        param.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        grad = param.grad + 0.5 * param.detach()
        optimizer.param_groups[0]["step"] = number - 1
        optimizer.step()
    momentum = optimizer.state[param]["momentum_buffer"]
    s = torch.linalg.svdvals(grad.lerp(momentum, 0.8))
    rank = f"{float(s.square().sum() / s[0].square()):.3g}"
    assert f"  one: 5 steps, 100% of the operations; stable rank {rank} .. {rank}; " in capsys.readouterr().out
