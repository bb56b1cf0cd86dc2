"""Megatron-Core's older assignment of layer-wise runs, a list of weights for each rank: whose is balanced, and how."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon.plugin import layer_wise
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_layer_wise_balance import THREE_LAYERS, arguments, busiest, names_of, param_states
from tests.megatron.test_routing import MOE
from tests.pool import RankPool


def lists(layout: Layout, options: dict[str, Any], by_cost: bool) -> tuple[list[list[str]], list[list[str]], set[str]]:
    """Runs on a rank: the lists of the older assignment, dense and experts, and what this rank's optimizer holds."""
    with contextlib.nullcontext() if by_cost else upstream_owners():
        run = harness.start(layout, param_layout=False, **options)
    names = names_of(run)
    optimizer = run.optimizer
    dense, expert = optimizer.dp_cp_params_list, optimizer.expt_dp_params_list or []
    both = [[[names[param] for param in its] for its in each] for each in (dense, expert)]
    return both[0], both[1], {names[param] for param in param_states(optimizer)}


@contextlib.contextmanager
def upstream_owners() -> Iterator[None]:
    """As before this package balanced owners."""
    before, layer_wise.assign_owners = layer_wise.assign_owners, lambda jobs, ranks, room: [job.owner for job in jobs]
    try:
        yield
    finally:
        layer_wise.assign_owners = before


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(THREE_LAYERS, id="dense", marks=pytest.mark.slow),
        pytest.param({**MOE, **THREE_LAYERS}, id="experts"),
    ],
)
@pytest.mark.parametrize(
    ("world", "layout"),
    [pytest.param(2, Layout(layer_wise=True), marks=pytest.mark.slow), (4, Layout(tp=2, etp=1, layer_wise=True))],
)
def test_older_assignment(pool: RankPool, world: int, layout: Layout, model: dict[str, Any]) -> None:
    """Muon's weights change lists, no list gets longer than the longest was, and Adam's weights stay."""
    if layout.tp > 1:
        layout = Layout(tp=2, etp=1, sp=True, layer_wise=True)
    ours, theirs = (pool.run(lists, world, layout, model, by_cost) for by_cost in (True, False))
    sizes = pool.run(sizes_and_muon, world, layout, model)[0]
    for kind in (0, 1):
        assert all(rank[kind] == ours[0][kind] for rank in ours), "the same lists on all ranks"
        new, old = ours[0][kind], theirs[0][kind]
        assert sorted(itertools.chain(*new)) == sorted(itertools.chain(*old))
        if not new:
            continue
        assert max(sum(sizes[name][0] for name in its) for its in new) <= max(
            sum(sizes[name][0] for name in its) for its in old
        )
        scalar = [[name for name in its if not sizes[name][1]] for its in new]
        assert [sorted(its) for its in scalar] == [sorted(name for name in its if not sizes[name][1]) for its in old], (
            "Adam's weights stay where they were"
        )
        owner = {name: rank for rank, its in enumerate(new) for name in its if sizes[name][1]}
        before = {name: rank for rank, its in enumerate(old) for name in its if sizes[name][1]}
        assert busiest(owner) <= busiest(before)
        assert kind == 1 or busiest(owner) < busiest(before)
    for number, (dense, expert, held) in enumerate(ours):
        mine = set(dense[number // layout.tp]) | set(expert[number] if expert else ())
        assert held == mine


def sizes_and_muon(layout: Layout, options: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Runs on a rank: elements of each weight, and whether it is Muon's."""
    run = harness.start(layout, param_layout=False, **options)
    return {name: (param.numel(), not _is_nonlinear_or_embedding(param)) for param, name in names_of(run).items()}


def apart_after_a_step() -> list[str]:
    """Runs on a rank: weights that differ from the first rank's, in a bfloat16 model with float32 norms."""
    import megatron_muon

    megatron_muon.install()
    layout = Layout(layer_wise=True, overlap=False)
    layout.initialize()
    from megatron.core.optimizer import get_megatron_optimizer

    (chunk,) = harness.build_model(layout, num_layers=1, bf16=True)
    for name, param in chunk.named_parameters():
        param.data = param.data.float() if "norm" in name else param.data
    (chunk,) = harness.wrap([chunk], layout, param_layout=False)
    optimizer = get_megatron_optimizer(harness.optimizer_config(layout, bf16=True), [chunk])
    generator = torch.Generator().manual_seed(0)
    for param in chunk.parameters():
        param.main_grad.copy_(torch.randn(param.shape, generator=generator))
    chunk.finish_grad_sync()
    optimizer.step()
    apart = []
    for name, param in chunk.named_parameters():
        first = param.detach().clone()
        dist.broadcast(first, 0)
        apart += [] if torch.equal(first, param) else [name]
    return apart


def test_weights_of_several_types_are_gathered_as_they_are(pool: RankPool) -> None:
    assert pool.run(apart_after_a_step, 2) == [[], []]


def decisions(optimizer: str, checkpoint_format: str) -> bool:
    """Runs on a rank: whether the older assignment is balanced by cost."""
    import megatron_muon

    megatron_muon.install()
    layout = Layout(layer_wise=True)
    layout.initialize()
    from megatron.core.optimizer import get_megatron_optimizer

    chunks = harness.wrap(harness.build_model(layout, **THREE_LAYERS, bf16=True), layout, param_layout=False)
    with arguments(optimizer=optimizer, ckpt_format=checkpoint_format):
        built = get_megatron_optimizer(harness.optimizer_config(layout, name=optimizer, bf16=True), chunks)
    return built.options_of_cost is not None


@pytest.mark.parametrize(
    ("optimizer", "checkpoint_format", "by_cost"),
    [
        ("muon", "torch_dist", True),
        ("muon", "torch", False),
        ("adaptive_muon", "torch_dist", True),
        ("soap", "torch_dist", False),
    ],
)
def test_when_lists_stay_upstreams(pool: RankPool, optimizer: str, checkpoint_format: str, by_cost: bool) -> None:
    """Other optimizers', and those of ``--ckpt-format torch``, whose files have no names."""
    assert pool.run(decisions, 2, optimizer, checkpoint_format) == [by_cost, by_cost]
