"""The step as a CUDA graph, without a GPU: its operations done again, without any of its Python, on the same memory.

Whatever number should be on the device, and is the host's, is the one of the captured step then.
"""

from __future__ import annotations

import copy
import math
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.graph import StepGraph, capture
from megatron_muon.optimizers.stages import Variant
from megatron_muon.optimizers.step import Step
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.plugin.sleeping import sleep
from megatron_muon.routing.layout import COLUMN_NORM, SCALAR, SIGN, STIEFEL, MatrixLayout, Section
from tests.recorded import Recorder, recorded

ROWS = MatrixLayout("in_proj", (Section("q", 4), Section("b", 1, SCALAR), Section("v", 6), Section("a", 2, SCALAR)))
WARMUP, STEPS = 2, 8
NEVER = 10**9


def directed(direction: str) -> MatrixLayout:
    return MatrixLayout("whole", (), direction=direction)


CASES: dict[str, tuple[list[MatrixLayout | None], dict[str, Any]]] = {
    "plain": ([None, None], {}),
    "nesterov": ([None], {"nesterov": True}),
    "independent": ([None], {"weight_decay_method": "independent"}),
    "scheduled": ([None], {"weight_decay_method": "independent_scheduled"}),
    "cautious": ([None], {"weight_decay_method": "cautious", "nesterov": True}),
    "l2": ([None, ROWS], {"weight_decay_method": "l2"}),
    "rows under Adam": ([ROWS, ROWS, None], {"nesterov": True, "scalar_lr_mult": 0.5, "scalar_wd_mult": 0.3}),
    "rows under Lion": ([ROWS, None], {"scalar_optimizer": "lion"}),
    "damped": ([None], {"damping_depth": 2.0, "scale_mode": "spectral_norm"}),
    "update_norm": ([None], {"scale_mode": "update_norm"}),
    **{name: ([None, ROWS], {"variant": name}) for name in ("adamuon", "adamuon_eo", "normuon", "namo")},
    **{name: ([None], {"variant": name, "scale_mode": "none"}) for name in ("polargrad", "hyperball")},
    "sphere": ([None], {"variant": "spectral_sphere"}),
    "balls": ([directed(SIGN), directed(COLUMN_NORM), None], {}),
    "stiefel": ([directed(STIEFEL), None], {"variant": StiefelMuon("admm", 2)}),
}


def parameters(layouts: list[MatrixLayout | None], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for layout in layouts:
        param = torch.nn.Parameter(torch.randn(26, 12, generator=generator).to(dtype))
        if layout is not None:
            param.matrix_layout = layout
        param.grad = torch.zeros_like(param)
        found.append(param)
    return found


def train(optimizer: Muon, steps: int = STEPS, first: int = 0) -> None:
    """Steps with a schedule of learning rate and weight decay, and gradients that come into the same memory."""
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1.2 + math.sin(number))
            # Of method l2 it is captured as it is.
            group["weight_decay"] = 0.1 + (optimizer.config.weight_decay_method != "l2") * 0.05 * number
            for param in group["params"]:
                gradient = torch.randn(param.shape, generator=generator)
                if param.grad is not None:
                    param.grad.copy_(gradient)
        optimizer.step()


def built(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Muon:
    layouts, options = CASES[name]
    params = parameters(layouts, dtype)
    return Muon([{"params": some} for some in (params[:1], params[1:]) if some], **options, **more)


def all_of(optimizer: Muon) -> list[torch.Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [value for param in params for _, value in sorted(optimizer.state[param].items())]
    return [param.detach() for param in params] + [torch.as_tensor(value) for value in state]


def same(first: Muon, second: Muon) -> bool:
    return all(torch.equal(one, two) for one, two in zip(all_of(first), all_of(second), strict=True))


def check_replays(captured: Muon, anew: Muon) -> None:
    """Bit for bit the steps of an optimizer that takes each step anew."""
    replays: list[int] = []
    graph = capture(captured, WARMUP, how=recorded(replays))
    capture(anew, NEVER, how=recorded())
    train(captured)
    train(anew)
    assert len(replays) >= STEPS // 2 and graph.is_captured, replays
    assert same(captured, anew)


@pytest.mark.parametrize("name", CASES)
def test_replays_are_steps(name: str) -> None:
    check_replays(built(name), built(name))


@pytest.mark.parametrize("name", CASES)
def test_numbers_on_the_device_are_those_of_the_host(name: str) -> None:
    """In float64, since some variants make much of a difference in rounding."""
    anew, plain = built(name, torch.float64), built(name, torch.float64)
    capture(anew, NEVER, how=recorded())
    train(anew)
    train(plain)
    for one, two in zip(all_of(anew), all_of(plain), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_sixteen_bits(dtype: torch.dtype) -> None:
    captured, anew = built("rows under Adam", dtype), built("rows under Adam", dtype)
    capture(captured, WARMUP, how=recorded())
    capture(anew, NEVER, how=recorded())
    train(captured)
    train(anew)
    assert same(captured, anew)


@pytest.mark.parametrize(("name", "form"), [("rows under Adam", "int8"), ("plain", "bf16"), ("normuon", "fp32")])
def test_replays_of_other_forms_are_steps(name: str, form: str) -> None:
    """In place: remainders and momentum are where they were captured, and nothing of them was read on the host."""
    check_replays(*(built(name, torch.bfloat16, master="remainder", momentum_dtype=form) for _ in range(2)))


@pytest.mark.parametrize("name", ["plain", "rows under Adam", "cautious"])
def test_numbers_of_the_host_would_be_seen(name: str) -> None:
    """The tests above can fail: they do with a step whose numbers are the host's."""
    optimizer, other = built(name), built(name)
    train(optimizer, 2)
    train(other, 2 + STEPS)
    replay = recorded()(torch.no_grad()(lambda: Step(optimizer).run()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "step", replay)
        train(optimizer, STEPS, 2)
    assert not same(optimizer, other)


def change_options(optimizer: Muon) -> None:
    for group in optimizer.param_groups:
        group["momentum"], group["extra_scale_factor"] = 0.7, 0.3


def take_a_gradient(optimizer: Muon) -> None:
    optimizer.param_groups[0]["params"][0].grad = None


def give_it_other_memory(optimizer: Muon) -> None:
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.zeros_like(param)


def load(optimizer: Muon) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def empty_a_second_moment(optimizer: Muon) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg_sq"].zero_()


def move_off_the_manifold(optimizer: Muon) -> None:
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].mul_(1.5)


@pytest.mark.parametrize(
    ("name", "event", "stays"),
    [
        ("plain", change_options, False),
        ("rows under Adam", take_a_gradient, False),
        ("plain", give_it_other_memory, False),
        ("rows under Adam", load, False),
        ("normuon", load, False),
        ("rows under Adam", empty_a_second_moment, True),
        ("stiefel", move_off_the_manifold, True),
    ],
)
def test_what_is_not_as_captured_is_stepped_anew(name: str, event: Callable[[Muon], None], stays: bool) -> None:
    """And is captured in turn, at the next attempt, unless the graph still fits."""
    replays: list[int] = []
    captured, anew = built(name), built(name)
    graph = capture(captured, WARMUP, how=recorded(replays))
    capture(anew, NEVER, how=recorded())
    for optimizer in (captured, anew):
        train(optimizer, 4)
        event(optimizer)
    before = len(replays)
    for optimizer in (captured, anew):
        train(optimizer, 1, 4)
    assert len(replays) == before == 2
    assert graph.is_captured is stays
    for optimizer in (captured, anew):
        train(optimizer, 12, 5)
    assert len(replays) > before + 4 and graph.is_captured and same(captured, anew)


@pytest.mark.parametrize("name", ["plain", "rows under Adam", "cautious"])
def test_rates_may_become_tensors(name: str) -> None:
    """As when a checkpoint has them; somebody may write to them before each step."""
    replays: list[int] = []
    captured, anew = built(name), built(name)
    graph = capture(captured, WARMUP, how=recorded(replays))
    capture(anew, NEVER, how=recorded())
    for optimizer in (captured, anew):
        train(optimizer, 4)
        rates = [torch.tensor(0.0) for _ in optimizer.param_groups]
        for number in range(3):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate.fill_(0.1 + number)
            optimizer.step()
    assert len(replays) == 5 and graph.is_captured and same(captured, anew)


@pytest.mark.parametrize("steps", [3, 4])
def test_what_is_no_number_is_refused_with_its_name(steps: int) -> None:
    """Where a graph is launched, and where one is to be captured."""
    optimizer = built("plain")
    capture(optimizer, WARMUP, how=recorded())
    train(optimizer, steps)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ConfigError, match=r"^lr None: give a finite number"):
        optimizer.step()


def test_sleep_leaves_nothing_behind() -> None:
    optimizer = built("rows under Adam")
    graph = capture(optimizer, WARMUP, how=lambda work: [work(), lambda: None][1])
    train(optimizer, WARMUP + 1)
    assert graph.is_captured
    moments = [weakref.ref(state["exp_avg_sq"]) for state in optimizer.state.values() if "exp_avg_sq" in state]
    sleep(optimizer)
    assert len(moments) == 2 and not any(moment() is not None for moment in moments) and not graph.is_captured
    assert graph._replay is None  # whose memory is the chunks'


def test_others_are_told_of_all_weights_after_the_launch() -> None:
    optimizer, replays, told = built("plain"), list[int](), list[tuple[int, int]]()
    optimizer.finals.append(lambda params: told.append((len(replays), len(params))))
    capture(optimizer, WARMUP, how=recorded(replays))
    train(optimizer, 4)
    assert told[-2:] == [(1, 2), (2, 2)] and sum(count for _, count in told) == 4 * 2  # each once in each step


def test_the_host_writes_numbers_and_nothing_else() -> None:
    """Of 320 weights, as many as one rank has of ``llama3_70b`` at TP 8: no operation for each, and few calls."""
    params = parameters([None, ROWS] * 160)
    optimizer = Muon([{"params": params[:160]}, {"params": params[160:]}])
    capture(optimizer, WARMUP, how=lambda work: [work(), lambda: None][1])
    train(optimizer, WARMUP + 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    calls = 0

    def notice(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    with Recorder() as recorder:
        sys.setprofile(notice)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    # Rates and decay of two groups, of matrices and of rows; two bias corrections of each.
    names = [func.overloadpacket.__name__ for func, *_ in recorder.calls]
    assert [name for name in names if not name.startswith("_record_function")] == ["fill_"] * 12
    assert calls <= 30 * len(params), calls / len(params)


class Counting(Variant):
    """Depends on the number of the step."""

    def adapt(self, matrices: Any) -> list[torch.Tensor]:
        return [update.direction / update.step for update in matrices.updates]


def test_a_step_that_reads_on_the_host_is_not_captured(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer, replays = Muon(parameters([None]), variant=Counting()), list[int]()
    capture(optimizer, WARMUP, how=recorded(replays))
    train(optimizer, 4)
    assert not replays and "read numbers of the device on the host" in capsys.readouterr().out
    graph = StepGraph(optimizer, recorded())
    graph.capture_next()
    with pytest.raises(RuntimeError, match="a captured step reads the number of the step on the host"):
        graph.step()


def test_what_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="its weights are on cpu, and CUDA graphs are of GPUs"):
        capture(built("plain"))
    with pytest.raises(ConfigError, match="fixed_point solver computes eigenvalues"):
        capture(Muon(parameters([None]), variant=StiefelMuon("fixed_point")), how=recorded())
    monkeypatch.setattr("megatron_muon.optimizers.handled.is_capturing", lambda device: True)
    with pytest.raises(ConfigError, match=r"Muon.step\(\) within a CUDA graph: .*graph.capture"):
        train(built("plain"))
