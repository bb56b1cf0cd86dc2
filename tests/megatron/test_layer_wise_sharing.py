"""Layer-wise runs in which ranks orthogonalize for one another: the same training, by all ranks alike."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon.engine.modes import LENT, SPLIT, Cost, Machine, Sizes
from megatron_muon.engine.prediction import predict
from megatron_muon.engine.step import StepEngine
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_layer_wise_balance import names_of
from tests.megatron.test_layer_wise_training import states
from tests.megatron.test_routing import MOE
from tests.pool import RankPool
from tests.slow import with_slow

UNEVEN = {"hidden_size": 64, "ffn_hidden_size": 512, "num_layers": 1}
"""Each matrix of the MLP costs as much as all of attention."""

NARROW = {"ffn_hidden_size": 128}
"""Splits are by the standard iteration, which float32 takes for matrices near to squares alone."""

PER_HEAD = {"muon_qkv": "per_head"}


@contextlib.contextmanager
def free_messages() -> Iterator[None]:
    """Messages count for nothing, so that matrices of any size are lent."""
    before = Machine.of
    Machine.of = classmethod(lambda cls, device_type: cls(flops=1e11, bytes=1e15, latency=0.0))
    try:
        yield
    finally:
        Machine.of = before


def engines_of(run: Run) -> list[StepEngine]:
    """Those that this rank has planned."""
    parts = [part for each in run.optimizer.chained_optimizers for part in getattr(each, "chained_optimizers", [each])]
    return [engine for part in parts for engine in getattr(getattr(part, "optimizer", None), "engines", ())]


def shared(run: Run) -> Counter[str]:
    """How many matrices other ranks orthogonalize, and in which way."""
    found: Counter[str] = Counter()
    for engine in engines_of(run):
        for chunk in engine.plan.chunks:
            if chunk.mode in (LENT, SPLIT):
                found[f"{chunk.mode} {chunk.group}"] += sum(batch.count for batch in chunk.batches)
    return found


def train(layout: Layout, options: dict[str, Any]) -> tuple[list[float], Counter[str]]:
    with free_messages():
        run = harness.start(layout, **options)
        losses = run.losses(3)
        engines = [engine for engine in engines_of(run) if engine.shares]
        for engine in engines:
            engine.counters.reset()
        losses += run.losses(1)
        for engine in engines:
            check_account(engine)
        return losses, shared(run)


def check_account(engine: StepEngine) -> None:
    """What the step did is what the plan predicts."""
    sizes = Sizes(engine.wire.dtype.itemsize, engine.wire.back.itemsize, engine.wire.gram.itemsize)
    ranks = {name: each.rank for name, each in engine._exchanges.items()}
    counted = engine.counters
    done = Cost(counted.flops, counted.bytes, counted.collectives)
    assert done == predict(engine.plan, engine.orthogonalizer, sizes, ranks)


HEADS = {"num_attention_heads": 16, "kv_channels": 64, "ffn_hidden_size": 64}
DATA, EXPERTS, GRID = "data-parallel", "expert data-parallel", "tensor x data-parallel"
THREE_EXPERTS = {**MOE, "num_moe_experts": 3}
ONE_DENSE = {**MOE, "num_layers": 4, "moe_layer_freq": [0, 1, 1, 1]}


def with_set(name: str) -> dict[str, Any]:
    return {**PER_HEAD, "muon_coefficient_type": name}


CASES = {
    "two": (
        2,
        Layout(layer_wise=True),
        {**NARROW, "optimizer": with_set("turbo_muon")},
        [f"lent {DATA}", f"split {DATA}"],
    ),
    "older": (
        2,
        Layout(layer_wise=True),
        {**NARROW, "param_layout": False, "optimizer": with_set("cubic5")},
        [f"lent {DATA}", f"split {DATA}"],
    ),
    "four": (4, Layout(layer_wise=True), {}, [f"lent {DATA}"]),
    "tensor": (4, Layout(tp=2, layer_wise=True), HEADS, [f"lent {DATA}"]),
    "heads cut": (4, Layout(tp=2, layer_wise=True), {**HEADS, "num_query_groups": 1}, [f"lent {GRID}"]),
    "experts": (4, Layout(tp=2, etp=1, sp=True, layer_wise=True), THREE_EXPERTS, [f"split {EXPERTS}"]),
    "virtual": (4, Layout(pp=2, vpp=2, layer_wise=True), ONE_DENSE, [f"lent {DATA}"]),
}
SLOW = ("older", "four", "experts", "tensor")


@pytest.mark.parametrize("case", with_slow(CASES, *SLOW))
def test_training_equals_that_of_one_process(pool: RankPool, tmp_path: Path, case: str) -> None:
    world, layout, options, ways = CASES[case]
    options = {**UNEVEN, "optimizer": PER_HEAD, **options}
    model = {key: value for key, value in options.items() if key not in ("param_layout", "optimizer")}
    folder = str(tmp_path / "initial")
    pool.run(harness.save_initial_weights, 1, folder, **model)
    expected, _ = pool.run(train, 1, Layout(), {**model, "optimizer": options["optimizer"], "weights": folder})[0]
    ranks = pool.run(train, world, layout, {**options, "weights": folder})
    assert sorted(ranks[0][1]) == ways
    assert all(losses == ranks[0][0] for losses, _ in ranks)
    assert ranks[0][0] == pytest.approx(expected, abs=4e-6)  # as in test_layouts


def one_step(layout: Layout, options: dict[str, Any], lending: bool) -> tuple[Counter[str], dict, dict]:
    """What is lent; this rank's momentum, and the main copies of its weights afterwards."""
    with free_messages() if lending else contextlib.nullcontext():
        run = harness.start(layout, **options)
        run.losses(1)
        names, masters = names_of(run), {}
        for part in run.optimizer.chained_optimizers:
            for inner in getattr(part, "chained_optimizers", [part]):
                groups = getattr(inner.optimizer, "param_groups", ())
                masters.update(
                    {names[p]: p.detach().clone() for group in groups for p in group["params"] if p in names}
                )
        return shared(run), states(run), masters


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param({}, id="muon"),
        pytest.param({"name": "adaptive_muon"}, id="adaptive", marks=pytest.mark.slow),
    ],
)
def test_state_stays_with_the_holder(pool: RankPool, optimizer: dict[str, Any]) -> None:
    """With main copies of bfloat16 weights: the same ranks have the same state, and the weights are as close as can be.

    The gradients of the first step are the same to the bit; an update differs by the order of additions in splits,
    and more where it is divided by second moments (2.4e-6 with ``adaptive``).
    """
    options = {**UNEVEN, **NARROW, "bf16": True, "optimizer": {**PER_HEAD, **optimizer}}
    alone = pool.run(one_step, 2, Layout(layer_wise=True), options, False)
    together = pool.run(one_step, 2, Layout(layer_wise=True), options, True)
    assert not alone[0][0] and len(together[0][0]) == 2
    for (_, momentum, weights), (_, its_momentum, its_weights) in zip(alone, together, strict=True):
        assert momentum.keys() == its_momentum.keys()
        assert all(torch.equal(momentum[name], its_momentum[name]) for name in momentum)
        for name, weight in weights.items():
            torch.testing.assert_close(its_weights[name], weight, rtol=0, atol=5e-6)
