"""bfloat16 models whose masters are remainders, and whose gradients are bfloat16: the bits, the bytes and the logs."""

from __future__ import annotations

import gc
import inspect
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.optimizers import storage
from megatron_muon.plugin.kept import describe_kept
from megatron_muon.plugin.optimizer_state import param_states
from megatron_muon.plugin.qk_clip import clip_of
from megatron_muon.plugin.without_copies import _clip_all, _norms_of_all
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_layer_wise_balance import arguments
from tests.megatron.test_nonfinite import NAN, WEIGHTS, scene
from tests.megatron.test_routing import GDN, MOE
from tests.pool import RankPool
from tests.slow import with_slow

LEAN: dict[str, Any] = {"muon_master": "remainder"}
BF16: dict[str, Any] = {"grad_reduce_in_fp32": False}


def muon_states(run: Run) -> list[Any]:
    """Those of Muon's weights on this rank."""
    return [each for each in param_states(run.optimizer) if isinstance(each.inner, Muon)]


def masters(run: Run) -> list[torch.Tensor]:
    """Float32 numbers of the weights that this rank updates, Adam's too."""
    held = [(each.key, each.inner.state) for each in param_states(run.optimizer) if each.key is not None]
    return [storage.read(storage.master_of(key, state[key])).detach().clone() for key, state in held]


def trained(layout: Layout, optimizer: dict[str, Any], options: dict[str, Any], steps: int) -> dict[str, Any]:
    """What there is after some steps, and what Megatron logs of each."""
    from megatron.training.training import calc_params_l2_norm

    changes = {"log_num_zeros_in_grad": True, **optimizer}
    run = harness.start(layout, bf16=True, optimizer=changes, early=True, **options)
    logs, step = [], run.optimizer.step

    def step_and_log() -> Any:
        result = step()
        logs.append((float(result[1]), result[2], calc_params_l2_norm(run.chunks)))
        return result

    run.optimizer.step = step_and_log
    with arguments(use_megatron_fsdp=False, bf16=True, optimizer="muon"):
        losses = run.losses(steps)
    if "qk_clip" in options:
        assert int(clip_of(run.chunks).heads_clipped) > 0
    weights = [param.detach().clone() for chunk in run.chunks for param in chunk.parameters()]
    kept = sum(storage.REMAINDER in each.inner.state[each.key] for each in muon_states(run))
    return {"losses": losses, "logs": logs, "weights": weights, "masters": masters(run), "kept": kept}


def compare(layout: Layout, optimizer: dict[str, Any], options: dict[str, Any], steps: int = 10) -> int:
    """Runs on a rank: masters as float32 copies and as remainders make the same run, bit for bit."""
    copies = trained(layout, optimizer, options, steps)
    lean = trained(layout, {**optimizer, **LEAN}, options, steps)
    assert copies["kept"] == 0
    assert lean["losses"] == copies["losses"]
    for name in ("weights", "masters"):
        assert len(lean[name]) == len(copies[name])
        assert all(map(torch.equal, lean[name], copies[name])), name
    for (norm, zeros, size), (norm_, zeros_, size_) in zip(lean["logs"], copies["logs"], strict=True):
        assert (norm, zeros) == (norm_, zeros_)
        assert size == pytest.approx(size_, rel=1e-6)
    assert any(not torch.equal(master, master.bfloat16().float()) for master in lean["masters"])
    return lean["kept"]


SMALL = {"num_layers": 2}
CLIPPED = {**SMALL, "qk_clip": True, "qk_clip_threshold": 0.5, "init_method_std": 0.2}
CASES: dict[str, tuple[int, Layout, dict[str, Any], dict[str, Any]]] = {
    "plain, QK-clip": (1, Layout(), {"clip_grad": 0.1}, CLIPPED),
    "TP 2, rows under Adam": (
        2,
        Layout(tp=2),
        {"muon_gdn_in_proj": "split"},
        {**GDN, **SMALL, "ddp": BF16},
    ),
    "layer-wise, overlapped": (2, Layout(layer_wise=True), {"muon_nesterov": True}, CLIPPED),
    "lists": (
        2,
        Layout(layer_wise=True, overlap=False),
        {},
        {**SMALL, "param_layout": False, "ddp": BF16},
    ),
    "EP 2": (2, Layout(ep=2, layer_wise=True), {"muon_momentum_dtype": "bf16"}, {**MOE, **SMALL}),
}


@pytest.mark.parametrize("name", with_slow(CASES, "lists", "EP 2"))
def test_remainders_are_float32_masters(pool: RankPool, name: str) -> None:
    ranks, layout, optimizer, options = CASES[name]
    assert all(pool.run(compare, ranks, layout, optimizer, options))


def averaged(layout: Layout, master: str) -> tuple[list[float], list[float]]:
    """Runs on a rank: momentum is the float32 average of bfloat16 gradients, which nobody has copied.

    Returns:
        losses with bfloat16 gradients, and with float32 ones.
    """
    changes = {"muon_master": master, "clip_grad": 0.0}
    run = harness.start(layout, bf16=True, optimizer=changes, ddp=BF16, **SMALL)
    expected: dict[torch.Tensor, torch.Tensor] = {}
    ready = run.optimizer.step_with_ready_grads

    def step_with_ready_grads() -> Any:
        for each in muon_states(run):
            gradient = storage.gradient_of(each.key)
            assert gradient is each.param.main_grad and gradient.dtype == torch.bfloat16
            before = expected.get(each.key, torch.zeros(each.param.shape))
            expected[each.key] = torch.lerp(before, gradient.float(), 1.0 - 0.95)
        return ready()

    run.optimizer.step_with_ready_grads = step_with_ready_grads
    losses = run.losses(6)
    for each in muon_states(run):
        assert torch.equal(each.inner.state[each.key]["momentum_buffer"], expected[each.key])
    assert expected
    return losses, harness.start(layout, bf16=True, optimizer=changes, **SMALL).losses(6)


@pytest.mark.parametrize(
    ("layout", "master"),
    [pytest.param(Layout(), "fp32", marks=pytest.mark.slow), (Layout(layer_wise=True), "remainder")],
    ids=["copies", "remainders"],
)
def test_momentum_of_bfloat16_gradients(pool: RankPool, layout: Layout, master: str) -> None:
    for narrow, wide in pool.run(averaged, 2, layout, master):
        assert narrow == pytest.approx(wide, abs=2e-2) and narrow[-1] < narrow[0]


WIDE = {"num_layers": 1, "hidden_size": 256, "ffn_hidden_size": 256, "kv_channels": 64}
"""Whole blocks of int8 momentum, in rows that are long beside the number that each has."""


def live(master: str, momentum: str, ddp: dict[str, Any]) -> tuple[float, int, list[str]]:
    """Runs on a rank: bytes a parameter of Muon's weights; live float32 tensors beside them of such a size; what the
    report says.
    """
    changes = {"muon_master": master, "muon_momentum_dtype": momentum}
    before = {id(each) for each in gc.get_objects() if isinstance(each, torch.Tensor)}
    run = harness.start(Layout(), bf16=True, optimizer=changes, ddp=ddp, **WIDE)
    run.losses(2)
    held, storages = muon_states(run), {}
    for each in held:
        for tensor in (each.param, each.param.main_grad, each.key, *each.inner.state[each.key].values()):
            if isinstance(tensor, torch.Tensor):
                storages[tensor.data_ptr()] = tensor.nbytes
    gc.collect()
    adams = [each for each in param_states(run.optimizer) if not isinstance(each.inner, Muon)]
    shapes = {each.param.shape for each in held} - {each.param.shape for each in adams}
    assert len(shapes) == 2
    made = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and id(each) not in before]
    others = sum(
        each.shape in shapes and each.dtype == torch.float32 and each.data_ptr() not in storages for each in made
    )
    return sum(storages.values()) / sum(each.param.numel() for each in held), others, describe_kept(run.optimizer)


@pytest.mark.parametrize(
    ("master", "momentum", "ddp", "expected", "words"),
    [
        ("fp32", "fp32", {}, 14.0, "weight bf16 2, gradient fp32 4, master fp32 4, momentum fp32 4"),
        ("fp32", "bf16", BF16, 10.0, "weight bf16 2, gradient bf16 2, master fp32 4, momentum bf16 2"),
        ("remainder", "bf16", BF16, 8.125, "weight bf16 2, gradient bf16 2, master remainder 2.125, momentum bf16 2"),
        ("remainder", "int8", BF16, 7.141, "weight bf16 2, gradient bf16 2, master remainder 2.125, momentum int8 1."),
    ],
    ids=lambda value: str(value) if isinstance(value, float) else "",
)
def test_bytes_a_parameter(
    pool: RankPool, master: str, momentum: str, ddp: dict[str, Any], expected: float, words: str
) -> None:
    found, others, report = pool.run(live, 1, master, momentum, ddp)[0]
    assert found == pytest.approx(expected, rel=0.02)
    assert others == 0
    assert report[0].startswith(f"Muon's weights: {expected:g} bytes a parameter ({words}")


def reloaded() -> list[bool]:
    """Runs on a rank: whether masters are other than the weights; as they are once weights have been told of."""
    run = harness.start(Layout(), bf16=True, optimizer=LEAN, **SMALL)
    run.losses(2)
    states = muon_states(run)

    def is_rounded() -> bool:
        read = [storage.read(storage.master_of(each.key, each.inner.state[each.key])) for each in states]
        return all(torch.equal(master, each.param.float()) for each, master in zip(states, read, strict=True))

    found = [is_rounded()]
    assert all(storage.gradient_of(each.key) is each.param.main_grad for each in states)
    run.optimizer.zero_grad()
    assert all(storage.gradient_of(each.key) is None for each in states)
    run.optimizer.reload_model_params()
    return [*found, is_rounded()]


def test_masters_become_the_weights_that_were_loaded(pool: RankPool) -> None:
    assert pool.run(reloaded, 1)[0] == [False, True]


def test_steps_with_nan_are_skipped(pool: RankPool) -> None:
    cases = [(NAN, WEIGHTS["muon"], 1), (NAN, WEIGHTS["adam"], 0)]
    found = pool.run(scene, 2, Layout(layer_wise=True), {**SMALL, "ddp": BF16}, LEAN, cases)
    assert [rank[:2] for rank in found] == [[(False, True)] * 2] * 2


def parameters() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights with gradients of two types under two names, and these gradients."""
    narrow, wide = (torch.nn.Parameter(torch.zeros(40, 50, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    grads = [torch.randn(40, 50).bfloat16(), torch.randn(40, 50)]
    narrow.decoupled_grad, wide.grad = grads  # type: ignore[attr-defined]
    return [wide, narrow, torch.nn.Parameter(torch.zeros(2))], grads


def test_kernels_take_gradients_of_one_type_at_once() -> None:
    """Megatron's on GPUs read a list as numbers of the type of its first tensor."""
    params, grads = parameters()
    calls: list[set[torch.dtype]] = []

    def clip(some: list[Any], max_norm: float, total_norm: float, use_decoupled_grad: bool) -> None:
        assert use_decoupled_grad
        calls.append({each.decoupled_grad.dtype for each in some})

    _clip_all(clip, params, 1.0, 2.0)
    assert sorted(calls, key=str) == [{torch.bfloat16}, {torch.float32}]
    assert params[0].decoupled_grad is None and params[0].grad is grads[1]  # type: ignore[attr-defined]
    only = params[:1]
    _clip_all(lambda *given: calls.append(given), only, 1.0, 2.0)  # type: ignore[arg-type]
    assert calls[-1] == (only, 1.0, 2.0, False)


def test_norms_of_bfloat16_gradients_are_float32() -> None:
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    params, grads = parameters()
    optimizer = SimpleNamespace(config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False))
    optimizer.config.use_precision_aware_optimizer = False
    original = inspect.unwrap(MegatronOptimizer._filter_grads_for_norm)
    with mock.patch("megatron.core.tensor_parallel.param_is_not_tensor_parallel_duplicate", return_value=True):
        found = _norms_of_all(original, optimizer, params)
    assert {each.dtype for each in found} == {torch.float32}
    norm = torch.stack([each.norm() for each in found]).norm()
    assert norm.item() == pytest.approx(torch.stack([grad.double().norm() for grad in grads]).norm().item(), rel=1e-6)
    assert not optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
