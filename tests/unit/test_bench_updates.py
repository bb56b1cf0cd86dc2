"""The benchmark checks every update: the right ones pass, wrong ones are caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from tests.reference import orthogonalized
from tools.bench.accuracy import Errors, Reference, WrongUpdateError, check, exact_update, update_errors
from tools.bench.cases import Case, WeightSpec
from tools.bench.command import main
from tools.bench.contestants import Contestant, contestants
from tools.bench.forms import FORMS, Tensors
from tools.bench.ranks import Groups, World

ALONE = World(0, 1, torch.device("cpu"), 1)


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (1, 1, 7), (3, 6, 6)])
@pytest.mark.parametrize("name", ["quintic", "cubic5", "turbo_muon"])
def test_reference_is_the_polynomial_of_singular_values(name: str, shape: tuple[int, ...]) -> None:
    steps = iteration(name, 5)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([orthogonalized(matrix, steps.coefficients, steps.balanced) for matrix in x])
    assert torch.allclose(exact_update(x, steps), expected, rtol=0, atol=1e-11)


def measured_errors(contestant: Contestant, wrong: Callable[[list[torch.nn.Parameter]], None] | None = None) -> Errors:
    """Of a contestant on small weights; ``wrong`` spoils its parameters first."""
    specs = (
        WeightSpec("qkv", (32, 12), _wide_qkv()),
        WeightSpec("glu", (32, 12), _gated(16)),
        WeightSpec("w", (10, 7)),
    )
    tensors = Tensors(Case("x", 1, 1, specs, "--case x"), Groups(), torch.device("cpu"), FORMS)
    entries = tensors.entries[contestant.form]
    before = [entry.weight.tensor.clone() for entry in entries]
    params = [entry.parameter() for entry in entries]
    if wrong is not None:
        wrong(params)
    optimizer = contestant.make(params, Groups())
    usual = [dict(group) for group in optimizer.param_groups]
    errors = update_errors(contestant, optimizer, entries, Reference(tensors), ALONE)
    assert all(torch.equal(entry.weight.tensor, old) for entry, old in zip(entries, before, strict=True))
    for group, old in zip(optimizer.param_groups, usual, strict=True):
        assert {key: group[key] for key in ("lr", "weight_decay")} == {key: old[key] for key in ("lr", "weight_decay")}
    assert errors is not None
    return errors


def _wide_qkv() -> MatrixLayout:
    return MatrixLayout("qkv", (Section("q", 8), Section("k", 4), Section("v", 4)))


def _gated(rows: int) -> MatrixLayout:
    return MatrixLayout("glu", (Section("gate", rows), Section("up", rows)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore:Could not determine rank")
def test_updates_of_all_contestants_are_right(dtype: str) -> None:
    """Ours, and others' as they are installed, each on the form that it gets."""
    for contestant in contestants(dtype, 1):
        if contestant.polynomial:
            errors = measured_errors(contestant)
            check(contestant, errors)
            assert errors.bound is not None and errors.mean <= errors.worst
            assert errors.worst > errors.bound * 1e-4, "the reference shares its rounding"


def _forget_layouts(params: list[torch.nn.Parameter]) -> None:
    for param in params:
        param.matrix_layout = WHOLE


def _other_gradients(params: list[torch.nn.Parameter]) -> None:
    for param in params:
        assert param.grad is not None
        param.grad = param.grad * (1 + torch.rand_like(param))


def _one_bad_number(params: list[torch.nn.Parameter]) -> None:
    assert params[0].grad is not None
    params[0].grad = params[0].grad.clone()
    params[0].grad[0, 0] = float("nan")


@pytest.mark.parametrize("wrong", [_forget_layouts, _other_gradients, _one_bad_number])
def test_wrong_update_is_caught(wrong: Callable[[list[torch.nn.Parameter]], None]) -> None:
    ours = contestants("bf16", 1)[0]
    with pytest.raises(WrongUpdateError, match="megatron_muon auto: the update of a matrix is off by"):
        check(ours, measured_errors(ours, wrong))


def test_command_ends_with_an_error_if_an_update_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.bench import accuracy

    monkeypatch.setitem(accuracy.BOUNDS, "fp32", 1e-9)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as leaving:
            main(["--quick", "--case", "experts", "--tp", "1", "--dtype", "fp32", "--threads", "1", "--device", "cpu"])
    finally:
        torch.set_num_threads(threads)
    assert leaving.value.code == 1
    assert "megatron_muon auto: the update of a matrix is off by" in capsys.readouterr().err
