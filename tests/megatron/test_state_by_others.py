"""Optimizer state that frameworks handle between steps: moved and brought back, replaced, zeroed, taken away.

A run whose state goes away and comes back takes the steps of one that is left alone, to the bit; one whose state is
gone takes the first step of a fresh optimizer.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import megatron_muon
from megatron_muon import ConfigError
from tests.megatron import harness
from tests.megatron.harness import Data, Layout, Run
from tests.megatron.test_routing import GDN
from tests.pool import RankPool

SPLIT = {"muon_gdn_in_proj": "split"}
VARIANTS: dict[str, dict[str, Any]] = {
    "rows under Adam": SPLIT,
    "spectral norm": {**SPLIT, "muon_scale_mode": "spectral_norm"},
    "adaptive": {"name": "adaptive_muon", **SPLIT, "adaptive_muon_moment2_method": "normuon"},
    "sphere": {"name": "spectral_sphere", "muon_sphere_radius": 0.0, "muon_sphere_tolerance": 1.0},
    "hyperball": {"muon_variant": "hyperball", "muon_scale_mode": "none"},
}


def start(layout: Layout, optimizer: dict[str, Any], **options: Any) -> Run:
    options = {**GDN, "num_layers": 1, "data": Data(sequence=8, global_batch=2), **options}
    return harness.start(layout, optimizer=optimizer, early=True, **options)


def inner(run: Run) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers, Muon's first."""

    def walk(part: Any) -> Iterator[Any]:
        for each in getattr(part, "chained_optimizers", ()):
            yield from walk(each)
        if not hasattr(part, "chained_optimizers"):
            yield part.optimizer

    return walk(run.optimizer)


def muon(run: Run) -> megatron_muon.Muon:
    return next(each for each in inner(run) if isinstance(each, megatron_muon.Muon))


def weights(run: Run) -> list[torch.Tensor]:
    """The model's, and the masters."""
    masters = [param.detach() for each in inner(run) for group in each.param_groups for param in group["params"]]
    return [*(param.detach() for chunk in run.chunks for param in chunk.parameters()), *masters]


def copied(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def tensors(run: Run) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    for each in inner(run):
        for state in each.state.values():
            for key, value in list(state.items()):
                if isinstance(value, torch.Tensor):
                    yield state, key, value


# What frameworks do, and undo.


def by_every_key(run: Run) -> None:
    for state, key, value in tensors(run):
        state[key] = value.clone()


def by_adams_keys(run: Run) -> None:
    for state, key, value in tensors(run):
        if key in ("exp_avg", "exp_avg_sq", "master_param"):
            state[key] = value.clone()


def by_data(run: Run) -> None:
    """State and masters by ``.data``; model weights too, where they are no views of DDP's buffers."""
    for _, _, value in tensors(run):
        value.data = value.data.clone()
    for each in inner(run):
        for param in (param for group in each.param_groups for param in group["params"]):
            if param.untyped_storage().nbytes() == param.nbytes:
                param.data = param.data.clone()


def by_storage(run: Run) -> None:
    """As allocators do that give memory back and take it again: tensors stay the same objects."""
    for value in [value for _, _, value in tensors(run)]:
        kept, size = value.clone(), value.untyped_storage().nbytes()
        value.untyped_storage().resize_(0)
        value.untyped_storage().resize_(size)
        value.data.copy_(kept)


def by_our_calls(run: Run) -> None:
    """The bytes are those of what there is; on the CPU, what sleeps has another place, but the same device."""
    before = [value.data_ptr() for _, _, value in tensors(run)]
    counted = megatron_muon.state_bytes(run.optimizer)
    assert megatron_muon.sleep(run.optimizer) == sum(counted.on_device.values()) > 0
    assert not set(before) & {value.data_ptr() for _, _, value in tensors(run)}
    assert counted == megatron_muon.state_bytes(run.optimizer)
    assert megatron_muon.wake(run.optimizer) == 0
    with tempfile.TemporaryDirectory() as folder:
        assert run.optimizer.sleep(folder) == sum(megatron_muon.state_bytes(run.optimizer).elsewhere.values()) > 0
        assert run.optimizer.wake() == sum(counted.on_device.values())


def by_snapshot(run: Run) -> None:
    """A state dict in memory, a step that is taken back, and the state loaded again."""
    saved, kept, step = copy.deepcopy(run.optimizer.state_dict()), copied(weights(run)), run.step
    run.losses(1)
    run.optimizer.load_state_dict(saved)
    for weight, value in zip(weights(run), kept, strict=True):
        weight.copy_(value)
    run.step = step


ROUND_TRIPS: list[Callable[[Run], None]] = [by_every_key, by_adams_keys, by_data, by_storage, by_our_calls, by_snapshot]


# What they do to start anew.


def cleared(run: Run) -> None:
    muon(run).state.clear()


def popped(run: Run) -> None:
    for group in muon(run).param_groups:
        for param in group["params"]:
            muon(run).state.pop(param, None)


def zeroed_in_place(run: Run) -> None:
    for state in muon(run).state.values():
        torch._foreach_zero_([value for value in state.values() if isinstance(value, torch.Tensor)])


def zeroed_by_name(run: Run) -> None:
    for state in muon(run).state.values():
        for key in [key for key in state if key != "step"]:
            state[key] = torch.zeros_like(state[key])


RESETS: list[Callable[[Run], None]] = [cleared, popped, zeroed_in_place, zeroed_by_name]


def compare(layout: Layout, names: list[str], **options: Any) -> dict[str, list[str]]:
    """What was not equal to the bit, by variant."""
    return {name: _compare(layout, VARIANTS[name], **options) for name in names}


def _compare(layout: Layout, optimizer: dict[str, Any], **options: Any) -> list[str]:
    alone, handled = (start(layout, optimizer, **options) for _ in range(2))
    megatron_muon.reset(handled.optimizer)  # nothing is there yet
    alone.losses(2), handled.losses(2)
    wrong = []
    brief = layout.tp > 1  # each of its steps is some hundred collectives
    for handle in ROUND_TRIPS[-2:] if brief else ROUND_TRIPS:
        if handle is by_snapshot and layout.layer_wise and "param_layout" not in options:
            continue  # Adam's part is in the distributed optimizer, whose state dict has none
        handle(handled)
        alone.losses(1), handled.losses(1)
        if not all(map(torch.equal, weights(alone), weights(handled))):
            wrong.append(handle.__name__)
    fresh = start(layout, optimizer, **options)
    for weight, value in zip(weights(fresh), weights(handled), strict=True):
        weight.copy_(value)
    fresh.step = alone.step
    for _ in range(2):
        megatron_muon.reset(handled.optimizer)
    fresh.losses(1), handled.losses(1)
    if not all(map(torch.equal, weights(fresh), weights(handled))):
        wrong.append("reset")
    for reset in RESETS[-1:] if brief else RESETS:
        reset(handled)
        megatron_muon.reset(fresh.optimizer)
        fresh.losses(1), handled.losses(1)
        ours = [[param for group in muon(run).param_groups for param in group["params"]] for run in (fresh, handled)]
        if not all(map(torch.equal, *ours)):
            wrong.append(reset.__name__)
        megatron_muon.reset(handled.optimizer)  # of Adam, too, whose count of steps the others leave
        for weight, value in zip(weights(handled), weights(fresh), strict=True):
            weight.copy_(value)
        megatron_muon.reset(fresh.optimizer)
        fresh.losses(1), handled.losses(1)
    return wrong


@pytest.mark.parametrize(
    "layout,names,options",
    [
        pytest.param(Layout(tp=2), ["spectral norm"], {}, marks=pytest.mark.slow),
        pytest.param(Layout(), ["adaptive", "hyperball"], {"bf16": True}, marks=pytest.mark.slow),
        pytest.param(Layout(layer_wise=True), ["rows under Adam"], {}, marks=pytest.mark.slow),
        (Layout(layer_wise=True), ["rows under Adam"], {"bf16": True, "param_layout": False}),
        (Layout(layer_wise=True), ["sphere"], {"bf16": True}),
        pytest.param(Layout(layer_wise=True), ["spectral norm"], {"bf16": True}, marks=pytest.mark.slow),
    ],
    ids=["TP 2", "DP 2, bf16", "layer-wise", "older layer-wise, bf16", "layer-wise, bf16", "layer-wise, measured"],
)
def test_the_run_is_the_one_that_it_should_be(
    pool: RankPool, layout: Layout, names: list[str], options: dict[str, Any]
) -> None:
    for found in pool.run(compare, 2, layout, names, **options):
        assert found == {name: [] for name in names}


def step_with_state_elsewhere(layout: Layout, **options: Any) -> list[str]:
    """What the step says where one rank has a part of the state, Muon's or Adam's, elsewhere; then it goes on."""
    import torch.distributed as dist

    run, found, alone = start(layout, SPLIT, **options), [], dist.get_rank() == 1
    run.losses(1)
    for key in ("momentum_buffer", "exp_avg"):
        state, value = next((state, value) for state, name, value in tensors(run) if name == key)
        state[key] = value.to("meta") if alone else value
        with pytest.raises(ConfigError) as caught:
            run.losses(1)
        found.append(str(caught.value))
        state[key] = value
    run.losses(1)
    weight = harness.unwrap(run.chunks[0]).decoder.layers[0].mlp.linear_fc1.weight
    weight.data = weight.data.clone() if alone else weight.data
    with pytest.raises(ConfigError) as caught:
        run.losses(1)
    return [*found, str(caught.value)]


def test_a_step_without_its_state_is_refused(pool: RankPool) -> None:
    """On each rank, before anything is changed."""
    layout = Layout(layer_wise=True)
    for of_muon, of_adam, of_weight in pool.run(step_with_state_elsewhere, 2, layout, bf16=True):
        assert of_muon.startswith("Muon is to step on cpu, but the momentum_buffer of a weight, ")
        assert of_adam.startswith("GroupStepAdamW is to step on cpu, but the exp_avg of a weight, ")
        assert all(
            text.endswith("is on meta: call megatron_muon.wake(optimizer) before the step.")
            for text in (of_muon, of_adam)
        )
        assert "mlp.linear_fc1.weight: its memory is no longer in DistributedDataParallel's buffer" in of_weight


def vectors_after_a_reload() -> list[bool]:
    """Whether there are singular vectors of the weights, before and after these were said to be others."""
    run, found = start(Layout(layer_wise=True), VARIANTS["sphere"], bf16=True), []
    for act in (lambda: run.losses(1), run.optimizer.reload_model_params):
        act()
        found.append(any(value.any().item() for _, key, value in tensors(run) if key == "left_singular_vector"))
    return found


def test_vectors_of_weights_that_were_replaced_are_looked_for_anew(pool: RankPool) -> None:
    assert pool.run(vectors_after_a_reload, 2) == [[True, False]] * 2


def state_before_the_first_step() -> list[float]:
    """Largest absolute values in state that is made for a checkpoint, where memory is not zero by chance."""
    run = start(Layout(layer_wise=True), SPLIT)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        run.optimizer.sharded_state_dict(harness.model_state(run.chunks), metadata=harness.CHECKPOINT_METADATA)
    finally:
        torch.use_deterministic_algorithms(False)
    return [value.abs().max().item() for _, _, value in tensors(run)]


def test_state_that_is_saved_before_the_first_step_is_zero(pool: RankPool) -> None:
    for found in pool.run(state_before_the_first_step, 2):
        assert found
        assert not any(value != 0.0 for value in found)


def test_what_a_pass_over_keys_leaves_and_what_sleeps() -> None:
    """Tensors that say that they are on a GPU, without one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        param = torch.nn.Parameter(torch.empty(8, 4, device="cuda"))
        optimizer = megatron_muon.Muon([param])
        optimizer.state[param].update(
            momentum_buffer=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param), step=3
        )
        counted = megatron_muon.state_bytes(optimizer)
        assert counted.on_device == {"momentum_buffer": 128, "exp_avg_sq": 128}
        assert (counted.elsewhere, counted.left_by_keys) == ({}, 128)
        assert [megatron_muon.sleep(optimizer) for _ in range(2)] == [256, 0]
        assert megatron_muon.state_bytes(optimizer) == megatron_muon.StateBytes({}, counted.on_device, 0)
        param.grad = torch.zeros_like(param)
        with pytest.raises(ConfigError, match=r"asleep on the host: call wake\(\) of the optimizer"):
            optimizer.step()
        assert [megatron_muon.wake(optimizer) for _ in range(2)] == [256, 0]
        assert megatron_muon.state_bytes(optimizer) == counted
        assert param.device.type == "cuda"
