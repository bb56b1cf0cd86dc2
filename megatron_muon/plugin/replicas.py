"""Whether ranks that hold the same weight, or the same optimizer state, hold the same bits.

Nothing brings copies together again once they differ: data-parallel ranks exchange gradients, not weights. A bit that
memory has flipped, a kernel that adds in another order, a rank that was given other flags: the run goes on, and each
rank trains a model of its own. So each rank computes a number from the bits of all that it holds, and ranks that hold
copies compare these numbers, by two small all-reduces for each kind of weight; tensors are not sent.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.param_state import MASTER, ParamState
from megatron_muon.optimizers.handled import STEP
from megatron_muon.plugin.early_gather import settle
from megatron_muon.plugin.groups import device_of
from megatron_muon.plugin.optimizer_state import param_states
from megatron_muon.routing import global_names
from megatron_muon.routing.blocks import no_numbers_of_its_own
from megatron_muon.routing.predicate import is_expert_parallel

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 22
"""Elements that are summed at once: their words and factors take 64 MiB of the device."""
_LEAST = -(1 << 63)
_TOLD = 32
"""Differences between the same ranks that are told by name."""

WEIGHT = "weight"
"""What differs, where it is the weight itself and not a state of its optimizer."""


@torch.no_grad()
def check_replicas(optimizer: Any, model_chunks: Sequence[torch.nn.Module], groups: Any, ranks: Ranks) -> list[str]:
    """Compare all copies of weights and of optimizer state among the ranks of a model.

    Weights are compared over data- and context-parallel ranks (of experts: over those with the same experts), those
    that tensor parallelism does not divide over its ranks, too, and a table that the first and the last pipeline stage
    share over these. Momentum, master weights and what is kept beside them, second moments, and counts of steps are
    compared where there is more than one copy: state that one data-parallel rank owns, or has a slice of, over
    tensor-parallel ranks alone. Routers' ``expert_bias`` counts as a weight.

    Call it on all ranks of the model, between the backward pass and the next step: with ``--overlap-param-gather`` the
    forward pass has brought in by then what other ranks have updated. After a step, weights that are still to be
    gathered for the next forward pass would differ in a run with ``--no-use-layer-wise-param-layout``; gathers that are
    under way are waited for. The host waits for the device.

    Args:
        optimizer: Megatron-Core's, of the model; its state must be awake.
        model_chunks: of the model on this rank.
        groups: the model's, see :func:`megatron_muon.plugin.groups.groups_of_model`.
        ranks: all ranks of the model.

    Returns:
        what differs and on which ranks, the same on all ranks, ``"NAME: exp_avg (rank 3 of 0, 1, 2, 3)"``; empty if
        nothing does. At most 32 differences between the same ranks are told by name.
    """
    settle()
    kinds, slots = _agreed(optimizer, model_chunks, ranks)
    device = device_of(model_chunks)
    mine: list[tuple[int, str, str, int]] = []  # id of the ranks that have copies, name, slot, number
    left = 0
    for kind, held in sorted(kinds.items()):
        if group_list := _groups_of(kind, groups):
            found = _differing(held, slots, group_list, device)
            mine += found[:_TOLD]
            left += len(found[_TOLD:])
    gathered = ranks.by_number(lambda: (mine, left))
    return _told(gathered)


@dataclass(frozen=True, order=True)
class _Kind:
    """Of weights that have copies on the same ranks.

    Attributes:
        expert_data: whether its gradients are reduced over the expert data-parallel ranks.
        expert_tensor: whether tensor parallelism of experts is what would divide it.
        divided: whether tensor parallelism divides it.
        sliced: it is the state of which each data-parallel rank has a slice.
        tied: it is the table that two pipeline stages share.
    """

    expert_data: bool = False
    expert_tensor: bool = False
    divided: bool = False
    sliced: bool = False
    tied: bool = False


_TIED = _Kind(tied=True)

_DIVIDED = {"softmax_offset"}
"""Weights that tensor-parallel ranks have parts of, and that Megatron-Core and TransformerEngine do not mark so: one
number for each head (``--softmax-type learnable``)."""

_Numbers = dict[str, dict[str, torch.Tensor]]
"""Of the weights of a kind on this rank, in the order that all ranks have: a number for each slot."""


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A number that changes with any single bit, and almost surely with any other change, of order too.

    The sum of the elements' bits, each times an odd factor that is made of its place, modulo 2^64.

    Args:
        tensor: of any dtype and shape.

    Returns:
        an int64 scalar on the tensor's device; nothing waits for it.
    """
    words = tensor.detach().reshape(-1).view(_WORDS[min(tensor.element_size(), 8)])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    factors = _factors(min(len(words), _PIECE), tensor.device)
    for piece in words.split(_PIECE):
        # 2^64 wraps around, in products and in sums. What was summed before is moved on by an odd factor, too.
        total = total * 0x2545F4914F6CDD1D + (piece.long() * factors[: len(piece)]).sum()
    return total


def _factors(count: int, device: torch.device) -> torch.Tensor:
    """Odd numbers that look random: (count,), int64. In an arithmetic sequence, changes that are one would cancel."""
    places = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB
    return ((places ^ (places >> 29)) * -0x40A7B892E31B1A47) | 1


def _agreed(optimizer: Any, chunks: Sequence[torch.nn.Module], ranks: Ranks) -> tuple[dict[_Kind, _Numbers], list[str]]:
    """This rank's numbers, and the names of slots that any rank has."""
    kinds: dict[_Kind, _Numbers] = {}

    def look() -> set[str]:
        kinds.update(_numbers(optimizer, chunks))
        return {slot for held in kinds.values() for numbers in held.values() for slot in numbers}

    return kinds, sorted(set().union(*ranks.gather(look)))


def _numbers(optimizer: Any, chunks: Sequence[torch.nn.Module]) -> dict[_Kind, _Numbers]:
    kinds: dict[_Kind, _Numbers] = {_TIED: {}}

    def add(kind: _Kind, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        numbers = {slot: fingerprint(tensor) for slot, tensor in tensors.items()}
        kinds.setdefault(kind, {}).setdefault(name, {}).update(numbers)

    states: dict[torch.Tensor, ParamState] = {each.param: each for each in param_states(optimizer, refuse=False)}
    for name, param in _named(chunks):
        state = states.get(param)
        weight = {} if no_numbers_of_its_own(param) else {WEIGHT: param}
        of_state = {} if state is None else _state(state)
        kind = _Kind(
            is_expert_parallel(param),
            getattr(param, "expert_tp", False),
            bool(getattr(param, "tensor_model_parallel", False)) or name.rpartition(".")[2] in _DIVIDED,
        )
        if state is not None and state.slices is not None:
            add(dataclasses.replace(kind, sliced=True), name, of_state)
            of_state = {}
        add(kind, name, {**weight, **of_state})
        if getattr(param, "shared_embedding", False) and not kinds[_TIED]:
            add(_TIED, "the embedding that pipeline stages share", {**weight, **of_state})
    return kinds


def _named(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights, trained or not, and biases of routers, with their names in the whole model."""
    for chunk in chunks:
        modules = {}
        for (own, param), (name, _) in zip(chunk.named_parameters(), global_names(chunk), strict=True):
            modules[own.rpartition(".")[0]] = name.rpartition(".")[0]
            yield name, param
        for own, buffer in chunk.named_buffers():
            module, _, last = own.rpartition(".")
            if last == "expert_bias":
                yield f"{modules.get(module, module)}.{last}", buffer


def _state(held: ParamState) -> dict[str, torch.Tensor]:
    """State of this rank by name, as it is kept; the count of steps among it."""
    if held.key is None:
        return {}
    state = held.inner.state.get(held.key) or {}  # an access by [] would make one
    found = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if held.master is not None:
        found[MASTER] = held.master
    steps = state.get(STEP, held.group.get(STEP))
    if isinstance(steps, int | float):
        found[STEP] = torch.tensor(float(steps), dtype=torch.float64)
    return found


def _groups_of(kind: _Kind, groups: Any) -> list[dist.ProcessGroup]:
    """Those that cover the ranks with copies together, of more than one rank."""
    data = getattr(groups, "expt_dp", None) if kind.expert_data else _data(groups)
    tensor = getattr(groups, "expt_tp" if kind.expert_tensor else "tp", None)
    wanted = [None if kind.sliced else data, None if kind.divided else tensor]
    if kind.tied:
        embedding = getattr(groups, "embd", None)
        wanted = [embedding if _is_member(embedding) else None]
    return [group for group in wanted if group is not None and group.size() > 1]


def _data(groups: Any) -> Any:
    group = getattr(groups, "dp_cp", None)
    return getattr(groups, "dp", None) if group is None else group


def _is_member(group: Any) -> bool:
    return isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0


def _differing(
    held: _Numbers, slots: Sequence[str], groups: Sequence[dist.ProcessGroup], device: torch.device
) -> list[tuple[int, str, str, int]]:
    """What is not the same on all ranks that have it: the lowest of these ranks, name, slot and this rank's number."""
    names = list(held)
    missing = torch.tensor(_LEAST, device=device)  # on this rank: it makes neither the least nor the largest
    cells = [held[name].get(slot) for name in names for slot in slots]
    mine = torch.stack([missing, *(missing if cell is None else cell.to(device) for cell in cells)])
    is_there = torch.tensor([cell is not None for cell in cells], device=device)
    most = mine.clone()
    most[0] = -dist.get_rank()
    least = ~mine  # whose largest is that of the least: negation has no place for the smallest number
    least[1:][~is_there] = _LEAST
    both = torch.stack([most, least])
    for group in groups:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    apart = (both[0, 1:] > ~both[1, 1:]) & is_there
    lowest = -int(both[0, 0])  # waits for the device: what is found is told now
    if not bool(apart.any()):
        return []
    places = [(name, slot) for name in names for slot in slots]
    rows = zip(places, apart.tolist(), mine[1:].tolist(), strict=True)
    return [(lowest, name, slot, number) for (name, slot), differs, number in rows if differs]


def _told(gathered: Mapping[int, tuple[Sequence[tuple[int, str, str, int]], int]]) -> list[str]:
    """In words: of each difference, the ranks that have another number than most, if most have one."""
    numbers: dict[tuple[int, str, str], dict[int, int]] = {}
    for rank, (found, _) in sorted(gathered.items()):
        for lowest, name, slot, number in found:
            numbers.setdefault((lowest, name, slot), {})[rank] = number
    told = []
    for (_, name, slot), by_rank in numbers.items():
        (common, count), *_ = Counter(by_rank.values()).most_common(1)
        has_majority = 2 * count > len(by_rank)
        odd = [rank for rank, number in by_rank.items() if number != common] if has_majority else []
        where = f"rank {_listed(odd)} of {_listed([*by_rank])}" if odd else f"ranks {_listed([*by_rank])}"
        told.append(f"{name}: {slot} ({where})")
    if left := max(left for _, left in gathered.values()):
        told.append(f"and {left} more")
    return told


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
