"""All ranks of a world communicate in one order, and each gets what it expects: for hundreds of generated plans.

Ranks are symbolic: each is this process in turn, and carries out the very code of the step on tensors without contents.
What they have asked for is then carried out together (:mod:`tests.fake_cuda.sequences`).
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine.modes import AUTO, DISTRIBUTED, EXACT, GRAM, OWNER
from megatron_muon.engine.plan import Peers, Weight
from megatron_muon.routing.layout import WHOLE
from tests.fake_cuda.groups import Call
from tests.fake_cuda.sequences import check_meeting
from tests.fake_cuda.symbolic import calls_of, symbolic_rank
from tests.fake_cuda.world import COMPARISON, World
from tests.random_weights import SEEDS, random_weights

Case = tuple[list[Weight], str, float]
"""Weights, mode and MiB of a chunk."""


def moved(weight: Weight, seed: int, ranks: int, data: str, wide: str) -> Weight:
    """The weight, with a data-parallel rank that holds it."""
    holder = random.Random(seed).randrange(ranks)
    return dataclasses.replace(weight, peers=Peers(data, ranks, holder, wide))


def lost(weights: list[Weight], seed: int) -> list[Weight]:
    """Some of the weights: the others have no gradient in this step, on any rank."""
    choice = random.Random(seed)
    return [weight for weight in weights if choice.random() < 0.7] or weights[:1]


def meeting(ranks: int, of_rank: Callable[[int], Iterator[list[Call]]]) -> list[dict[int, list[Call]]]:
    """For each case the calls of all ranks, which meet."""
    each = [list(of_rank(rank)) for rank in range(ranks)]
    found = [dict(enumerate(calls)) for calls in zip(*each, strict=True)]
    for calls in found:
        check_meeting(calls)
    return found


def test_messages_before_a_collective_are_noticed() -> None:
    """On the rank that has no other first, too."""
    send = Call("send", (0, 1), 0, (4,), (0,), torch.float32, 1, 1, "data")
    receive = dataclasses.replace(send, kind="recv", rank=1, peer=0, sent=(0,), taken=(4,))
    first = [Call("all_gather", (0, 1), rank, (4,), (8,), torch.float32, name="data") for rank in range(2)]
    other = [dataclasses.replace(call, name="tp") for call in first]
    check_meeting({0: [other[0], first[0], send], 1: [other[1], first[1], receive]})
    with pytest.raises(AssertionError, match="rank 1: the first communication of a group"):
        check_meeting({0: [first[0], send], 1: [other[1], receive, first[1]]})


CHUNKS = (1e-6, 1e-3, 100.0)
"""MiB: one matrix, some, all."""


def tensor_cases(ranks: int, place: int, seeds: Iterable[int]) -> Iterator[Case]:
    """Dense weights that all ranks divide, and experts of pairs of ranks: other ones in each pair."""
    for seed in seeds:
        dense = [weight for weight in random_weights(seed, ranks) if weight.group != "expert tp"]
        experts = [weight for weight in random_weights(100 * place + seed, 2) if weight.group != "tp"]
        weights = [*lost(dense, seed), *lost(experts, seed + place)]
        random.Random(seed).shuffle(weights)
        for number, mode in enumerate(EXACT):
            for chunk_mb in CHUNKS[(seed + number) % 3 :][:2]:
                yield weights, mode, chunk_mb


def tensor_rank(rank: int, ranks: int, seeds: Iterable[int] = SEEDS) -> Iterator[list[Call]]:
    with symbolic_rank(rank, ranks) as recorder:
        pairs = [dist.new_group([first, first + 1]) for first in range(0, ranks, 2)]
        groups = {"tp": dist.group.WORLD, "expert tp": pairs[rank // 2]}
        for weights, mode, chunk_mb in tensor_cases(ranks, rank // 2, seeds):
            yield calls_of(recorder, weights, groups, mode, chunk_mb)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_tensor_parallel_ranks_meet(ranks: int) -> None:
    found = meeting(ranks, lambda rank: tensor_rank(rank, ranks))
    kinds = Counter(call.kind for calls in found for call in calls[0])
    assert set(kinds) == {"all_to_all", "all_gather", "all_reduce"}
    exchanges = [call.sent for calls in found for call in calls[0] if call.kind == "all_to_all"]
    assert any(0 in sent for sent in exchanges), "no empty parts"
    assert any(len(set(sent)) > 1 and 0 not in sent for sent in exchanges), "no uneven parts"


def grid_rank(rank: int, tensor: int, data: int, expert: int, seeds: Iterable[int] = SEEDS) -> Iterator[list[Call]]:
    """Of ``tensor`` x ``data`` ranks that share out work, with other experts on each of ``expert`` of the latter."""
    ranks = tensor * data
    shard, place = rank % tensor, rank // tensor
    with symbolic_rank(rank, ranks) as recorder:
        tp = [dist.new_group([tensor * d + t for t in range(tensor)]) for d in range(data)][place]
        dp = [dist.new_group([tensor * d + t for d in range(data)]) for t in range(tensor)][shard]
        homes = [
            [dist.new_group([tensor * d + t for d in range(e, data, expert)]) for e in range(expert)]
            for t in range(tensor)
        ]
        groups = {"tp": tp, "expert tp": tp, "data": dp, "expert data": homes[shard][place % expert]}
        wide = "grid" if tensor > 1 else ""
        if wide:
            groups[wide] = dist.group.WORLD
        for seed in seeds:
            dense = [weight for weight in random_weights(seed, tensor) if weight.group != "expert tp"]
            experts = [w for w in random_weights(50 * (place % expert) + seed, tensor) if w.group != "tp"]
            dense += [Weight((128, 1024), WHOLE)] * (seed % 2)  # too much for one rank
            weights = [moved(weight, seed + number, data, "data", wide) for number, weight in enumerate(dense)]
            weights += [
                moved(weight, seed + number, data // expert, "expert data", "") for number, weight in enumerate(experts)
            ]
            for mode, chunk_mb in zip((AUTO, OWNER, DISTRIBUTED), CHUNKS[seed % 3 :] + CHUNKS, strict=False):
                yield calls_of(recorder, weights, groups, mode, chunk_mb)


SIBLINGS = [pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 2, 1), (1, 4, 2), (2, 2, 2))]


@pytest.mark.parametrize("tensor,data,expert", [*SIBLINGS, (1, 3, 1), (2, 2, 1), (2, 4, 2)])
def test_ranks_that_share_work_meet(tensor: int, data: int, expert: int) -> None:
    found = meeting(tensor * data, lambda rank: grid_rank(rank, tensor, data, expert))
    shared = Counter(call.kind for calls in found for call in calls[0] if len(call.group) != tensor or tensor == data)
    assert shared["send"] == shared["recv"] > 0 and shared["all_to_all"] > 0, "nothing is lent, or nothing split"
    if tensor > 1:
        assert any(len(call.group) == tensor * data for calls in found for call in calls[0]), "nothing divided is lent"


def optimizer_rank(rank: int) -> list[list[Call]]:
    """Two steps of an optimizer on four ranks, of which pairs divide experts; some weights have no gradient."""
    found = []
    for mode in (AUTO, GRAM):
        with World(rank, 4) as world:
            pair = world.own_group([(0, 1), (2, 3)])
            dense = [world.parameter(16, 6, dim=1), world.parameter(5, 12, dim=0), world.parameter(8, 8, dim=0)]
            # The pairs have different experts, and not all of them have got tokens.
            experts = [world.parameter(12, 4 + 4 * (rank // 2), dim=1, expert=True) for _ in range(2 + rank // 2)]
            muon = Muon(
                [*dense, *experts], tp_group=dist.group.WORLD, expert_tp_group=pair, tp_mode=mode, ns_dtype="fp16"
            )
            for step in range(2):
                dense[step].grad = experts[rank // 2].grad = None
                with world.refusing(COMPARISON):
                    muon.step()
            found.append(world.calls)
    return found


def test_ranks_of_an_optimizer_meet() -> None:
    """With the comparison of plans before each step, too."""
    for calls in zip(*map(optimizer_rank, range(4)), strict=True):
        check_meeting(dict(enumerate(calls)))
        assert {len(call.group) for call in calls[0]} == {2, 4}
