"""The process groups of a model, the ranks that they are, and their device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from megatron_muon.agree import Ranks, backends_of
from megatron_muon.errors import ConfigError


def groups_or_default(pg_collection: Any) -> Any:
    """``pg_collection``, or for None Megatron-Core's ``ProcessGroupCollection`` of ``parallel_state``."""
    if pg_collection is not None:
        return pg_collection
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def groups_of_model(pg_collection: Any, chunks: Sequence[Any]) -> Any:
    """``groups_or_default`` with ``expt_tp``, which MIMO's optimizer does not have: its models do.

    Megatron-Core takes a group that is missing there for one rank, so that shards of experts would count as matrices.

    Raises:
        ConfigError: if a model with experts has it nowhere.
    """
    groups = groups_or_default(pg_collection)
    if getattr(groups, "expt_tp", None) is not None:
        return groups
    groups = copy.copy(groups)
    own = (getattr(module, "pg_collection", None) for chunk in chunks for module in chunk.modules())
    found = (group for each in own if (group := getattr(each, "expt_tp", None)) is not None)
    groups.expt_tp = next(found, groups.tp)
    named = (name for chunk in chunks for name, _ in chunk.named_parameters())
    experts = (name for name in named if "experts" in name and "shared" not in name)  # Megatron-Core's way to tell
    if groups.expt_tp is groups.tp and groups.tp is not None and groups.tp.size() > 1 and (name := next(experts, "")):
        raise ConfigError(
            f"pg_collection without expt_tp: over which ranks {name} is divided cannot be told. Give "
            "ProcessGroupCollection its expt_tp (the expert tensor-parallel ranks)."
        )
    return groups


def device_of(chunks: Sequence[Any]) -> torch.device:
    """Of a model on this rank. One without weights, an empty stage of a pipeline, is on the GPU that is in use."""
    param = next((param for chunk in chunks for param in chunk.parameters()), None)
    if param is not None:
        return param.device
    on_gpu = "cpu" not in backends_of() or torch.cuda.is_initialized()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def ranks_of(pg_collection: Any) -> Ranks:
    """All ranks that hold a part or a copy of a model: its model-parallel group by its data-parallel group.

    They need not be those of the run: a model may have groups of its own, on some of the ranks.

    Args:
        pg_collection: Megatron-Core's ``ProcessGroupCollection`` of the model; None for that of ``parallel_state``. As
            Megatron-Core's factory has it, ``mp`` is None if the model is not divided, and ``dp`` stands for a
            ``dp_cp`` that is not there.

    Raises:
        ConfigError: if the collection does not say which ranks they are.
    """
    groups = groups_or_default(pg_collection)
    tensor, pipeline, context, whole = (getattr(groups, name, None) for name in ("tp", "pp", "cp", "mp"))
    model = [tensor, pipeline] if whole is None else [whole]
    if "mp" not in vars(groups) and (tensor is None or pipeline is None):
        raise ConfigError(
            "pg_collection without mp: which ranks hold the model cannot be told. Give ProcessGroupCollection its mp "
            "(tensor x pipeline parallel ranks), or mp=None for a model that is not divided."
        )
    data = getattr(groups, "dp_cp", None)
    if data is None and (context is None or context.size() == 1):
        data = getattr(groups, "dp", None)
    if data is None:
        raise ConfigError(
            "pg_collection without dp_cp: which ranks hold the model cannot be told. Give ProcessGroupCollection its "
            "dp_cp (data x context parallel ranks), or dp if there is no context parallelism."
        )
    return Ranks(tuple(group for group in (*model, data) if group is not None))
