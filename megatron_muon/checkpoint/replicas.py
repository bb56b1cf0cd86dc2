"""After loading, copies of a weight and of its state must be the same bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.checkpoint.errors import raise_together
from megatron_muon.checkpoint.fingerprint import fingerprints
from megatron_muon.checkpoint.held import Held

__all__ = ["check"]


def check(chunks: Iterable[torch.nn.Module], held: Sequence[Held], groups: Any = None) -> None:
    """Compare weights, and state that is not shared out, over data-parallel ranks. All ranks must call this.

    Args:
        chunks: the model on this rank.
        held: state of its weights.
        groups: Megatron-Core's ``ProcessGroupCollection``; None for that of ``parallel_state``.

    Raises:
        CheckpointError: on all ranks, if copies differ.
    """
    if groups is None:
        from megatron.core.process_groups_config import ProcessGroupCollection

        groups = ProcessGroupCollection.use_mpu_process_groups()
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    names = {id(param): name for name, param in named}
    checked: list[tuple[str, torch.nn.Parameter, torch.Tensor]] = [(name, param, param.data) for name, param in named]
    for each in held:
        if each.slices is None and not each.owned:
            name = names.get(id(each.param), "a weight")
            checked += [(f"{state} of {name}", each.param, tensor) for state, tensor in sorted(each.tensors.items())]
    different: list[str] = []
    for experts, group_name in ((False, "dp_cp"), (True, "expt_dp")):
        group = getattr(groups, group_name, None)
        mine = [entry for entry in checked if (not getattr(entry[1], "allreduce", True)) == experts]
        if group is not None and group.size() > 1 and mine:
            different += _different(mine, group)
    raise_together(
        different,
        "The checkpoint is loaded, but these are not the same on all data-parallel ranks:",
        "A rank has read something else than the others. Start again; if it happens again, check the storage.",
    )


def _different(mine: Sequence[tuple[str, Any, torch.Tensor]], group: dist.ProcessGroup) -> list[str]:
    everywhere: list[Any] = [None] * group.size()
    dist.all_gather_object(everywhere, fingerprints(tensor for _, _, tensor in mine), group=group)
    return [
        name for (name, _, _), values in zip(mine, zip(*everywhere, strict=True), strict=True) if len(set(values)) > 1
    ]
