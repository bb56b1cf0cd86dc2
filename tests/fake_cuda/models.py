"""Ranks of published models on fake GPUs: their weights as ``plan`` has them, with Muon and Adam."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch

from megatron_muon import Muon
from megatron_muon.engine.plan import Weight
from megatron_muon.optimizers.engines import DATA, DENSE, EXPERT, EXPERT_DATA, WIDE, Sharing
from megatron_muon.orthogonalize.kernels import elementwise
from megatron_muon.planning.flags import Layout
from tests.fake_cuda.world import World
from tests.megatron.planner import PlannedRank


@dataclass(frozen=True)
class Taken:
    """What a rank's steps took.

    Attributes:
        state_bytes: of main copies, Muon's state and Adam's moments.
        peak: the most that a step after the first held beside that and gradients.
        launches: kernels of Muon's step on a GPU, by the operation, see :func:`tests.fake_cuda.launches.launches`.
        fused: the same where one kernel does each elementwise pass.
        chunks: of the plan.
    """

    state_bytes: int
    peak: int
    launches: Counter[str]
    fused: Counter[str]
    chunks: int


def taken(rank: PlannedRank) -> Taken:
    """Take steps of a rank of a model."""
    with World(rank.rank, rank.layout.ranks_of_stage) as world:
        groups = _groups(world, rank.layout)
        params = [_parameter(world, weight) for weight in rank.weights]
        scalars = [world.parameter(rank.scalars, grad=False)] if rank.scalars else []
        options, every = rank.options, [*params, *scalars]
        muon = Muon(
            params or [world.parameter(0, 0)],
            momentum=options.momentum,
            nesterov=options.nesterov,
            extra_scale_factor=options.extra_scale_factor,
            tp_mode=options.tp_mode,
            tp_group=groups[DENSE],
            expert_tp_group=groups[EXPERT],
        )
        adam = torch.optim.AdamW(scalars or [world.parameter(0)])
        muon.engines.compared_elsewhere = True
        if any(weight.peers for weight in rank.planned):
            own = [
                number
                for number, weight in enumerate(rank.planned)
                if weight.peers is None or dict(rank.places)[weight.peers.group] == weight.peers.holder
            ]
            shared = {name: groups[name] for name in (DATA, EXPERT_DATA, WIDE)}
            muon.engines.sharing = Sharing(rank.planned, own, shared, torch.device("cuda"))
        assert rank.has_main_copies  # the parameters of both
        for param in every:
            param.grad = torch.empty_like(param)
        gradients = sum(param.numel() * 4 for param in every)
        muon.step()
        adam.step()
        watch, before = world.watch, world.watch.live
        watch.peak, watch.launches = before, Counter()
        with world.refusing():
            muon.step()
        assert watch.live == before
        peak, launches, watch.launches = watch.peak - before, watch.launches, Counter()
        with _one_kernel_a_pass(world):
            muon.step()
        engine = next(iter(muon.engines))
        return Taken(before - gradients, peak, launches, watch.launches, len(engine.plan.chunks))


def _parameter(world: World, weight: Weight) -> torch.nn.Parameter:
    dim = weight.dim + 2 if weight.dim else None
    return world.parameter(*weight.shape, dim=dim, layout=weight.layout, grad=False, expert=weight.group == EXPERT)


def _groups(world: World, layout: Layout) -> dict[str, torch.distributed.ProcessGroup]:
    ranks = range(layout.ranks_of_stage)
    apart = layout.expert_tensor * layout.expert
    lists = {
        DENSE: [ranks[first : first + layout.tensor] for first in ranks[:: layout.tensor]],
        EXPERT: [ranks[first : first + layout.expert_tensor] for first in ranks[:: layout.expert_tensor]],
        DATA: [ranks[first :: layout.tensor] for first in range(layout.tensor)],
        EXPERT_DATA: [ranks[first::apart] for first in range(apart)],
        WIDE: [ranks],
    }
    return {name: world.own_group(its) for name, its in lists.items()}


def _one_kernel_a_pass(world: World) -> mock._patch[mock.Mock]:
    """Elementwise passes by kernels for all tensors, which there are none of here."""

    def launched(*_: object) -> bool:
        world.watch.launches["an elementwise pass"] += 1
        return True

    standing = {
        "_is_taken": lambda name, *tensors: bool(tensors[0]),
        "_kernels": lambda: mock.Mock(pack=launched, add=launched),
    }
    return mock.patch.multiple(elementwise, **standing)
