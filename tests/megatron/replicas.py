"""Whether ranks that have the same weight have the same bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(chunks: list) -> None:
    """Runs on a rank: compare the weights of data-, context-, tensor- and pipeline-parallel ranks that share them.

    Raises:
        AssertionError: on all ranks, with the names of the weights that differ and the ranks that have each value.
    """
    ranks: list[dict[Any, int]] = [{} for _ in range(dist.get_world_size())]
    if len(ranks) == 1:
        return
    dist.all_gather_object(ranks, fingerprints(chunks))
    values: dict[Any, dict[int, list[int]]] = {}
    for rank, found in enumerate(ranks):
        for key, value in found.items():
            values.setdefault(key, {}).setdefault(value, []).append(rank)
    apart = {key: list(each.values()) for key, each in values.items() if len(each) > 1}
    assert not apart, f"replicas have drifted apart (weight and shard: ranks with equal bits): {apart}"


def fingerprints(chunks: list) -> dict[tuple[str, int, int], int]:
    """Name in the model, expert-parallel rank and tensor-parallel rank, where there are shards -> sum over the bits."""
    from megatron.core import parallel_state

    from megatron_muon.routing.annotate import global_names

    found = {}
    for chunk in chunks:
        for name, param in global_names(chunk):
            expert = not getattr(param, "allreduce", True)
            divided = getattr(param, "tensor_model_parallel", False)
            tensor = parallel_state.get_tensor_model_parallel_rank
            if expert:
                tensor = parallel_state.get_expert_tensor_parallel_rank
            number = parallel_state.get_expert_model_parallel_rank() if expert else 0
            if getattr(param, "shared_embedding", False):
                name = "tied embedding"
            found[name, number, tensor() if divided else 0] = fingerprint(param)
    return found


def fingerprint(param: torch.Tensor) -> int:
    """A number that changes with any single bit, and with an exchange of elements."""
    words = param.detach().contiguous().view(_WORDS[param.element_size()]).flatten().long()
    return int((words * (2 * torch.arange(len(words)) + 1)).sum())
