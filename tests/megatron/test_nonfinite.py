"""NaN and infinity in gradients that Megatron lets through: all ranks skip the step, stop, or do not look."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_routing import GDN
from tests.pool import RankPool

WEIGHTS = {
    "muon": "decoder.layers.0.mlp.linear_fc1.weight",  # divided by tensor parallelism, and owned by one rank if shared
    "adam": "decoder.final_layernorm.weight",
    "rows": "decoder.layers.0.self_attention.in_proj.weight",
}
OFF = {"clip_grad": 0.0}

State = dict[str, torch.Tensor]


def state_of(run: Run) -> State:
    """All that a step changes: weights, their float32 copies and states, on this rank."""
    from megatron_muon.plugin.optimizer_state import param_states

    found = {f"weight {name}": param for chunk in run.chunks for name, param in chunk.named_parameters()}
    for number, held in enumerate(param_states(run.optimizer)):
        if held.key is None:
            continue
        found[f"master {number}"] = held.key if held.master is None else held.master
        values = held.inner.state.get(held.key, {})
        found.update({f"{key} {number}": value for key, value in values.items() if isinstance(value, torch.Tensor)})
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def step_with(run: Run, value: float, name: str, rank: int) -> bool:
    """A step whose gradient has ``value`` in one element of one weight, as it comes on one rank of the run."""
    import torch.distributed as dist

    for chunk in run.chunks:
        chunk.zero_grad_buffer()
        for full, param in chunk.named_parameters():
            param.main_grad.fill_(1e-3)
            if full.endswith(name) and dist.get_rank() == rank:
                param.main_grad.view(-1)[-1] = value
        chunk.start_grad_sync()
        chunk.finish_grad_sync()
    return bool(run.optimizer.step()[0])


def scene(layout: Layout, model: dict[str, Any], optimizer: dict[str, Any], cases: list[Any]) -> list[Any]:
    """For each case: whether a step was taken, or the error; and whether it changed anything, or the next does.

    The last rank hears of the steps that were skipped, as Megatron's log does.
    """
    from megatron_muon.plugin import recording

    run = harness.start(layout, optimizer={**OFF, **optimizer}, early=True, bf16=layout.layer_wise, **model)
    run.losses(1)
    found = []
    for value, name, rank in cases:
        before = state_of(run)
        try:
            outcome: Any = step_with(run, value, name, rank)
        except RuntimeError as error:
            outcome = str(error)
        same = all(torch.equal(tensor, before[key]) for key, tensor in state_of(run).items())
        found.append((outcome, same))
    assert step_with(run, 1e-3, WEIGHTS["muon"], 0)
    after = state_of(run)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    counts = [source.count for source in recording._stepped.take() if source.title == "Gradients"]
    return [*found, *counts]


NAN, INF = float("nan"), float("inf")
LAYOUTS: dict[str, tuple[Layout, int, dict[str, Any]]] = {
    "one": (Layout(), 1, {}),
    "tp2": (Layout(tp=2), 2, {}),
    "pp2": (Layout(pp=2), 2, {}),
    "dp2": (Layout(), 2, {}),
    "layer_wise": (Layout(layer_wise=True, ddp_buffers=True), 2, {}),
    "layer_wise_lists": (Layout(layer_wise=True), 2, {}),
    "ep2": (Layout(ep=2), 2, {"num_moe_experts": 2}),
}


@pytest.mark.parametrize(
    "layout,ranks,model",
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if name in ("one", "dp2", "layer_wise_lists") else ())
        for name, case in LAYOUTS.items()
    ],
)
def test_steps_are_skipped_on_all_ranks(pool: RankPool, layout: Layout, ranks: int, model: dict[str, Any]) -> None:
    name = "experts.local_experts.0.linear_fc1.weight" if model else WEIGHTS["muon"]
    cases = [(NAN, name, 0), (INF, WEIGHTS["adam"], ranks - 1)]
    results = pool.run(scene, ranks, layout, model, {}, cases)
    for found in results[:-1]:
        assert found == [(False, True), (False, True)]
    assert results[-1] == [(False, True), (False, True), 2]


@pytest.mark.parametrize("layout,ranks", [(Layout(tp=2), 2), (Layout(layer_wise=True, ddp_buffers=True), 2)])
def test_the_run_stops_on_all_ranks_and_names_the_weight(pool: RankPool, layout: Layout, ranks: int) -> None:
    """Rows under Adam within a weight of Muon's count as any other."""
    model, optimizer = ({}, {}) if layout.layer_wise else (GDN, {"muon_gdn_in_proj": "split"})
    optimizer["muon_nonfinite"] = "stop"
    name = WEIGHTS["muon" if layout.layer_wise else "rows"]
    cases = [(-INF, name, 1), (NAN, WEIGHTS["adam"], 0)]
    for found in pool.run(scene, ranks, layout, model, optimizer, cases):
        assert all(same for _, same in found)
        for (message, _), (_, weight, _) in zip(found, cases, strict=True):
            assert message.startswith(f"NaN or infinity in the gradients of {weight}. Weights and momentum are")


def test_large_gradients_are_no_infinity(pool: RankPool) -> None:
    """Their squares are."""
    assert pool.run(scene, 1, Layout(), {}, {}, [(1e30, WEIGHTS["muon"], 0)]) == [[(True, False), 0]]


def without_ddp(choice: str) -> tuple[Any, bool]:
    """What a step with a NaN does to a bfloat16 model whose gradients are in ``.grad``; whether weights are finite."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer

    layout = Layout()
    layout.initialize()
    chunks = harness.build_model(layout, bf16=True, num_layers=1)
    config = harness.optimizer_config(layout, bf16=True, muon_nonfinite=choice, **OFF)
    optimizer = get_megatron_optimizer(config, chunks)
    for name, param in chunks[0].named_parameters():
        param.grad = torch.full_like(param, NAN if name.endswith(WEIGHTS["muon"]) else 1e-3)
    try:
        outcome: Any = optimizer.step()[0]
    except RuntimeError as error:
        outcome = str(error)
    return outcome, all(bool(param.isfinite().all()) for param in chunks[0].parameters())


def test_gradients_without_ddp_are_looked_at(pool: RankPool) -> None:
    """Megatron-Core has moved them into the masters' by then. It takes the step, if it is left alone."""
    assert pool.run(without_ddp, 1, "propagate") == [(True, False)]
    assert pool.run(without_ddp, 1, "skip") == [(False, True)]
    ((message, is_finite),) = pool.run(without_ddp, 1, "stop")
    assert message.startswith(f"NaN or infinity in the gradients of {WEIGHTS['muon']}. ") and is_finite


def beside_an_empty_stage(value: float) -> bool:
    """Whether a step was taken, with QK-clip; the second stage of the pipeline has no weights."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core import parallel_state
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.transformer.module import MegatronModule

    layout = Layout(pp=2)
    layout.initialize()
    (chunk,) = harness.build_model(layout, num_layers=2, qk_clip=True)
    if parallel_state.get_pipeline_model_parallel_rank() == 1:
        chunk = MegatronModule(chunk.config)
    optimizer = get_megatron_optimizer(harness.optimizer_config(layout, **OFF), [chunk])
    for param in chunk.parameters():
        param.main_grad = torch.full_like(param, value)
    return bool(optimizer.step()[0])


def test_a_stage_without_weights_takes_part(pool: RankPool) -> None:
    assert pool.run(beside_an_empty_stage, 2, 1e-3) == [True, True]
    assert pool.run(beside_an_empty_stage, 2, NAN) == [False, False]
