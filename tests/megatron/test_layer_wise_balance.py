"""Owners of layer-wise runs on real Megatron-Core: balanced by cost, the same on all ranks, and training as before."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_muon.engine.balance import Job, assign_owners
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_routing import MOE
from tests.pool import RankPool
from tests.slow import with_slow

THREE_LAYERS = {"num_layers": 3}
"""Which two ranks share unevenly by elements."""


def products(p: int, q: int) -> int:
    """Operations of five steps on a p x q matrix, p <= q."""
    return 5 * (4 * p * p * q + 2 * p**3)


COSTS = {
    "self_attention.linear_qkv.weight": products(32, 32) + 2 * products(16, 32),
    "self_attention.linear_proj.weight": products(32, 32),
    "mlp.linear_fc1.weight": 2 * products(32, 48),
    "mlp.linear_fc2.weight": products(32, 48),
    "mlp.router.weight": products(4, 32),
    "linear_fc1.weight": 2 * products(24, 32),  # of an expert
    "linear_fc2.weight": products(24, 32),
}
"""By hand, for the model of the harness and the experts of MOE; the first suffix that fits counts."""


def cost_of(name: str, tensor: int = 1) -> int:
    return next(cost // tensor for suffix, cost in COSTS.items() if name.endswith(suffix))


@dataclass
class Shares:
    """Of one kind of weights (dense or experts) on one rank."""

    owners: dict[str, int]
    """Of each weight, by its name."""
    upstream: dict[str, int]
    """The same, as Megatron-Core alone assigns them."""
    expected: dict[str, int]
    """What the function gives for the costs of this file."""
    held: set[str]
    """Weights in this rank's optimizer."""
    rank: int
    """In the data-parallel group."""


def names_of(run: Run) -> dict[torch.Tensor, str]:
    """Of weights and their main copies; with the number of the chunk, as chunks have weights of equal names."""
    names: dict[torch.Tensor, str] = {}
    for number, chunk in enumerate(run.chunks):
        for name, param in chunk.named_parameters():
            names[param] = names[getattr(param, "main_param", param)] = f"{number}.{name}"
    return names


def param_states(optimizer: Any) -> Iterator[torch.nn.Parameter]:
    """Model weights in the layer-wise part of an optimizer."""
    found = getattr(optimizer, "chained_optimizers", [])
    part = next((each for each in (optimizer, *found) if hasattr(each, "dp_cp_params_list")), None)
    assert part is not None
    for inner in part.chained_optimizers:
        for group in inner.param_groups:
            yield from group["params"]


def shares(layout: Layout, options: dict[str, Any], bucket_size: int | None) -> dict[bool, Shares]:
    """Runs on a rank: with the parameter layout."""
    from megatron.core import parallel_state
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    run = start(layout, options, bucket_size)
    names, held = names_of(run), set(param_states(run.optimizer))
    upstream = LayerWiseDistributedOptimizer.compute_full_param_layout.__wrapped__  # type: ignore[attr-defined]
    data = parallel_state.get_data_parallel_world_size()
    result = {}
    for experts in (False, True):
        ranks = parallel_state.get_expert_data_parallel_world_size() if experts else data
        found: list[tuple[Any, Any]] = []
        for chunk in run.chunks:
            params = [param for param in chunk.parameters() if param.requires_grad]
            before = upstream(params, chunk.bucket_size, data, chunk.ddp_config, expert_data_parallel_world_size=ranks)
            for key, buffer in before.layouts.items():
                if key.is_managed_by_layer_wise_optimizer and key.is_expert_parallel is experts:
                    found.append((buffer, chunk.full_param_layout.layouts[key]))
        if not found:
            continue
        for theirs, ours in found:
            check_buffer(theirs, ours, ranks)
        tensor = layout.etp or layout.tp if experts else layout.tp
        group = parallel_state.get_expert_data_parallel_group if experts else parallel_state.get_data_parallel_group
        owners = {names[p]: o for _, ours in found for p, o in owners_in(ours, ranks).items()}
        result[experts] = Shares(
            owners=owners,
            upstream={names[p]: o for theirs, _ in found for p, o in owners_in(theirs, ranks).items()},
            expected=expected_owners([theirs for theirs, _ in found], ranks, names, tensor),
            held={names[param] for param in held} & owners.keys(),
            rank=group().rank(),
        )
    return result


def start(layout: Layout, options: dict[str, Any], bucket_size: int | None) -> Run:
    return harness.start(dataclasses.replace(layout, bucket_size=bucket_size), **options)


def owners_in(buffer: Any, ranks: int) -> dict[torch.nn.Parameter, int]:
    found = {}
    for param, (start, _, bucket) in buffer.param_index_map.items():
        first, last = buffer.bucket_indices[bucket]
        found[param] = (start - first) * ranks // (last - first)
    return found


def check_buffer(theirs: Any, ours: Any, ranks: int) -> None:
    """The same buckets with the same weights; each weight aligned, whole in one shard, on top of no other."""
    assert ours.bucket_indices == theirs.bucket_indices
    assert ours.per_bucket_numel_unpadded == theirs.per_bucket_numel_unpadded
    assert (ours.num_optimizer_shards, theirs.num_optimizer_shards) == (ranks, ranks)
    assert list(ours.param_index_map) == list(theirs.param_index_map)
    for param, (start, end, bucket) in ours.param_index_map.items():
        first, last = ours.bucket_indices[bucket]
        shard = (last - first) // ranks
        assert bucket == theirs.param_index_map[param][2]
        assert start % 64 == 0
        assert end - start == param.numel()
        assert (start - first) // shard == (end - 1 - first) // shard
        assert first <= start < end <= last
    ends = sorted((start, end) for start, end, _ in ours.param_index_map.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def expected_owners(buffers: list[Any], ranks: int, names: dict[torch.nn.Parameter, str], tensor: int) -> dict:
    """The function itself, fed with Megatron-Core's buckets and the costs of this file."""
    jobs, room = [], []
    for buffer in buffers:
        first = len(room)
        room += [(end - start) // ranks for start, end in buffer.bucket_indices]
        for param, owner in owners_in(buffer, ranks).items():
            size = -(-param.numel() // 64) * 64
            bucket = first + buffer.param_index_map[param][2]
            jobs.append(Job(cost_of(names[param], divisor(param, tensor)), size, bucket, owner))
    params = [param for buffer in buffers for param in buffer.param_index_map]
    return {names[p]: o for p, o in zip(params, assign_owners(jobs, ranks, room), strict=True)}


def divisor(param: torch.nn.Parameter, tensor: int) -> int:
    return tensor if getattr(param, "tensor_model_parallel", False) else 1


def busiest(owners: dict[str, int]) -> int:
    loads: Counter[int] = Counter()
    for name, owner in owners.items():
        loads[owner] += cost_of(name)
    return max(loads.values())


CASES = {
    "dense": (2, Layout(layer_wise=True), THREE_LAYERS, None),
    "dense, buckets": (2, Layout(layer_wise=True), THREE_LAYERS, 6000),
    "dense bf16, four replicas": (4, Layout(layer_wise=True), {**THREE_LAYERS, "bf16": True}, None),
    "experts": (2, Layout(layer_wise=True), {**MOE, **THREE_LAYERS}, 6000),
    "expert parallel": (4, Layout(ep=2, layer_wise=True), {**MOE, **THREE_LAYERS}, None),
    "tensor": (4, Layout(tp=2, layer_wise=True), THREE_LAYERS, None),
    "tensor, experts whole": (4, Layout(tp=2, etp=1, sp=True, layer_wise=True), {**MOE, **THREE_LAYERS}, None),
    "virtual stages": (4, Layout(pp=2, vpp=2, layer_wise=True), {}, None),
}


@pytest.mark.parametrize("case", with_slow(CASES, "dense", "experts", "tensor", "dense, buckets", "expert parallel"))
def test_owners_follow_the_function(pool: RankPool, case: str) -> None:
    """On every rank, and the same on all that have a weight: tensor peers, replicas, expert-parallel peers."""
    world, layout, options, bucket_size = CASES[case]
    ranks = pool.run(shares, world, layout, options, bucket_size)
    stages = [ranks[: world // 2], ranks[world // 2 :]] if layout.pp > 1 else [ranks]
    for stage in stages:
        for experts, first in stage[0].items():
            assert first.owners == first.expected
            assert busiest(first.owners) <= busiest(first.upstream)
            for other in stage:
                assert other[experts].owners == first.owners
                mine = {name for name, owner in first.owners.items() if owner == other[experts].rank}
                assert other[experts].held == mine


def test_the_busiest_rank_has_less_to_do(pool: RankPool) -> None:
    """Three layers on two ranks: less than by elements, and within Graham's bound of the best of all shares."""
    share = pool.run(shares, 2, Layout(layer_wise=True), THREE_LAYERS, None)[0][False]
    costs = list(COSTS.values())[:4]
    parts = [
        sum(n * cost for n, cost in zip(counts, costs, strict=True)) for counts in itertools.product(range(4), repeat=4)
    ]
    best = min(max(3 * sum(costs) - part, part) for part in parts)
    assert best <= busiest(share.owners) < busiest(share.upstream)
    assert 6 * busiest(share.owners) <= 7 * best


def test_chunks_of_virtual_stages_are_balanced_together(pool: RankPool) -> None:
    """One layer a chunk, two ranks: each chunk by itself would burden the same rank with its costliest weight."""
    share = pool.run(shares, 4, Layout(pp=2, vpp=2, layer_wise=True), {}, None)[0][False]
    assert busiest(share.owners) == sum(list(COSTS.values())[:4])
    assert busiest(share.upstream) > busiest(share.owners)


@contextlib.contextmanager
def arguments(**values: Any) -> Iterator[None]:
    """As in a run of ``megatron.training``."""
    from megatron.training import global_vars

    before, global_vars._GLOBAL_ARGS = global_vars._GLOBAL_ARGS, SimpleNamespace(**values)
    try:
        yield
    finally:
        global_vars._GLOBAL_ARGS = before


def owners_under(optimizer: str) -> bool:
    """Runs on a rank: whether DDP's layout is Megatron-Core's own, with this ``--optimizer``."""
    import megatron_muon

    megatron_muon.install()
    layout = Layout(layer_wise=True)
    layout.initialize()
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    upstream = LayerWiseDistributedOptimizer.compute_full_param_layout.__wrapped__  # type: ignore[attr-defined]
    with arguments(optimizer=optimizer):
        (chunk,) = harness.wrap(harness.build_model(layout, **THREE_LAYERS), layout)
    theirs = upstream(list(chunk.parameters()), chunk.bucket_size, 2, chunk.ddp_config)
    return all(
        theirs.layouts[key].param_index_map == ours.param_index_map
        for key, ours in chunk.full_param_layout.layouts.items()
    )


@pytest.mark.parametrize(("optimizer", "own"), [("muon", False), ("dist_muon", False), ("soap", True)])
def test_other_optimizers_keep_their_owners(pool: RankPool, optimizer: str, own: bool) -> None:
    assert pool.run(owners_under, 2, optimizer) == [own, own]


def shared_first() -> tuple[int, int]:
    """Runs on a rank: owner of a weight that Megatron-Core takes for a shared embedding, and weights in its bucket."""
    import megatron_muon

    megatron_muon.install()
    layout = Layout(layer_wise=True)
    layout.initialize()
    chunks = harness.build_model(layout, **THREE_LAYERS)
    params = dict(chunks[0].named_parameters())
    shared = params["decoder.layers.2.mlp.linear_fc2.weight"]
    shared.shared_embedding = True  # type: ignore[attr-defined]
    (chunk,) = harness.wrap(chunks, layout)
    buffer = next(buffer for buffer in chunk.full_param_layout.layouts.values() if shared in buffer.param_index_map)
    owners = owners_in(buffer, 2)
    own_bucket = [
        param for param, place in buffer.param_index_map.items() if place[2] == buffer.param_index_map[shared][2]
    ]
    return owners[shared], len(own_bucket)


def test_a_shared_embedding_stays_in_the_first_shard(pool: RankPool) -> None:
    assert pool.run(shared_first, 2) == [(0, 1), (0, 1)]


def lay_out_without_groups() -> str:
    """Runs on a rank: the message for a divided weight whose group nobody knows."""
    import megatron_muon
    from megatron_muon import ConfigError

    megatron_muon.install()
    layout = Layout(tp=2, layer_wise=True)
    layout.initialize()
    chunks = harness.build_model(layout, num_layers=1)
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import layer_wise_optimizer

    layer_wise_optimizer.tag_params_for_buffer_routing(chunks)
    compute = functools.partial(
        layer_wise_optimizer.LayerWiseDistributedOptimizer.compute_full_param_layout,
        list(chunks[0].parameters()),
        None,
        2,
        DistributedDataParallelConfig(),
    )
    compute()
    parallel_state.destroy_model_parallel()
    try:
        compute()
    except ConfigError as error:
        return str(error)
    return ""


def test_a_group_that_nobody_knows(pool: RankPool) -> None:
    for message in pool.run(lay_out_without_groups, 2):
        assert "divided by tensor parallelism" in message and "pg_collection" in message
