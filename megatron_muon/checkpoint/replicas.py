"""After loading, copies of a weight and of its state must be the same bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import raise_together
from megatron_muon.checkpoint.fingerprint import fingerprints
from megatron_muon.checkpoint.held import Held
from megatron_muon.checkpoint.weights import is_plain
from megatron_muon.routing.predicate import is_expert_parallel

__all__ = ["check"]


def check(ranks: Ranks, chunks: Iterable[torch.nn.Module], held: Sequence[Held], groups: Any) -> None:
    """Compare weights, and state that is not shared out, over data-parallel ranks.

    Args:
        ranks: of the model; all of them must call this, under :meth:`Ranks.together`.
        chunks: the model on this rank.
        held: state of its weights.
        groups: Megatron-Core's ``ProcessGroupCollection`` of the model.

    Raises:
        CheckpointError: on all ranks, if copies differ.
    """
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    names = {id(param): name for name, param in named}
    checked: list[tuple[str, torch.nn.Parameter, torch.Tensor]] = [(name, param, param.data) for name, param in named]
    for each in held:
        if each.slices is None and not each.owned:
            name = names.get(id(each.param), "a weight")
            checked += [(f"{state} of {name}", each.param, tensor) for state, tensor in sorted(each.tensors.items())]
    sums: list[tuple[list[str], list[int], Any]] = []
    for experts, group_name in ((False, "dp_cp"), (True, "expt_dp")):
        group = getattr(groups, group_name, None)
        mine = [entry for entry in checked if is_expert_parallel(entry[1]) == experts]
        if group is not None and group.size() > 1 and mine:
            sums.append(([name for name, _, _ in mine], fingerprints(_numbers(tensor) for _, _, tensor in mine), group))
    ranks.together(lambda: None)  # whoever has failed so far must not be missed in what follows
    different = [name for names, values, group in sums for name in _different(names, values, Ranks((group,)))]
    raise_together(
        ranks,
        different,
        "The checkpoint is loaded, but these are not the same on all data-parallel ranks:",
        "A rank has read something else than the others. Start again; if it happens again, check the storage.",
    )


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What is compared.

    A quantized weight is a class that has other tensors in it, some of them caches: the numbers that it stands for. Of
    any other class, such as the shards of a ``DTensor``, nothing: whether ranks have the same is not known.
    """
    if is_plain(tensor):
        return tensor
    stands_for = type(tensor).dequantize is not torch.Tensor.dequantize
    return tensor.dequantize() if stands_for else torch.empty(0)


def _different(names: Sequence[str], values: list[int], copies: Ranks) -> list[str]:
    everywhere = zip(*copies.gather(lambda: values), strict=True)
    return [name for name, found in zip(names, everywhere, strict=True) if len(set(found)) > 1]
