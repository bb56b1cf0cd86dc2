"""Layer-wise runs: what other data-parallel ranks hold, so that ranks can orthogonalize for one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.engine.plan import Peers, Weight
from megatron_muon.optimizers.engines import DATA, EXPERT_DATA, WIDE, Engines, Sharing
from megatron_muon.optimizers.muon import Muon
from megatron_muon.routing.layout import MSIGN, layout_of
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding


def share_work(layer_wise: Any, optimizers: Sequence[Any]) -> None:
    """Tell the Muon optimizers inside of a layer-wise one what all ranks hold, when weights have been shared out.

    Args:
        layer_wise: Megatron-Core's, with its lists of each rank's weights: of the model, from before main copies.
        optimizers: inside.
    """
    for each in optimizers:
        muon = getattr(each, "optimizer", each)
        if isinstance(muon, Muon) and muon.variant.lends:
            muon.engines.sharing = _sharing(layer_wise, muon)


def _sharing(layer_wise: Any, muon: Muon) -> Sharing | None:
    """None where each weight has one copy, and where some steps take each tensor-parallel shard by itself."""
    wide = _wide_group(layer_wise)
    groups: dict[str, dist.ProcessGroup] = {} if wide is None else {WIDE: wide}
    weights: list[Weight] = []
    number: dict[torch.Tensor, int] = {}
    for name, group, lists in (
        (DATA, layer_wise.dp_cp, layer_wise.dp_cp_params_list),
        (EXPERT_DATA, layer_wise.expt_dp, layer_wise.expt_dp_params_list),
    ):
        if lists is None:
            continue
        groups[name] = group
        members = dist.get_process_group_ranks(group)
        # Of ranks at equal distances: the same for all groups that are spread alike, wherever they begin.
        span = len(members) * (max(members) - min(members)) // max(1, len(members) - 1)
        for holder, params in enumerate(lists):
            peers = Peers(name, len(lists), holder, WIDE if name == DATA and wide is not None else "", span)
            _add(params, peers, muon.engines, weights, number)
    if not number or (muon.config.blockwise_period > 1 and any(weight.dim for weight in weights)):
        return None  # ranks without weights do not count the steps of a period
    own = [param for group in muon.param_groups for param in group["params"]]
    _add([param for param in own if param not in number], None, muon.engines, weights, number)
    return Sharing(weights, [number.get(param, -1) for param in own], groups, next(iter(number)).device)


def _add(
    params: Sequence[torch.Tensor],
    peers: Peers | None,
    engines: Engines,
    weights: list[Weight],
    number: dict[torch.Tensor, int],
) -> None:
    """Number those that are orthogonalized."""
    for param in params:
        if not _is_nonlinear_or_embedding(param) and layout_of(param).direction == MSIGN:
            number[param] = len(weights)
            weights.append(engines.weight(param, peers))


def _wide_group(layer_wise: Any) -> dist.ProcessGroup | None:
    """The tensor-parallel ranks of all data-parallel ranks, numbered tensor first; None if there is no such group."""
    collection = layer_wise.pg_collection
    tensor, data, wide = (getattr(collection, name, None) for name in ("tp", "dp_cp", "tp_dp_cp"))
    if tensor is None or data is None or wide is None or tensor.size() == 1:
        return None
    ranks = dist.get_process_group_ranks(wide)
    rows = [ranks[start : start + tensor.size()] for start in range(0, len(ranks), tensor.size())]
    mine, others = dist.get_process_group_ranks(tensor), dist.get_process_group_ranks(data)
    place, shard = data.rank(), tensor.rank()
    fits = len(rows) == len(others) and rows[place] == mine and [row[shard] for row in rows] == others
    return wide if fits else None
