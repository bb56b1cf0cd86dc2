"""How the numbers of Muon's weights are kept, in the report."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from megatron_muon.choices import dtype_name
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.storage import MOMENTUM, REMAINDER, TIES, initial
from megatron_muon.optimizers.windows import OFFLOADED
from megatron_muon.plugin.optimizer_state import param_states


def describe_kept(optimizer: Any) -> list[str]:
    """Weights, gradients, masters and momentum of this rank's weights under Muon, each in what form and in how many
    bytes a parameter; empty if it has none.
    """
    sizes: Counter[tuple[str, str]] = Counter()
    count = 0
    held = [each for each in param_states(optimizer) if isinstance(each.inner, Muon)]
    for each in held:
        muon: Any = each.inner
        count += each.param.numel()
        gradient = getattr(each.param, "main_grad", None)
        dtype = each.param.dtype if gradient is None else gradient.dtype
        sizes["weight", dtype_name(each.param.dtype)] += each.param.nbytes
        sizes["gradient", dtype_name(dtype)] += each.param.numel() * dtype.itemsize
        # On no device: they have the sizes that they will have.
        key = torch.empty_like(each.param if each.master is None else each.master, device="meta")
        if each.master is not None:
            sizes["master", "fp32"] += key.nbytes
        state = initial(key, muon.config.master, muon.config.momentum_dtype)
        for name, tensor in state.items():
            of_master = name in (REMAINDER, TIES)
            form = "remainder" if of_master else dtype_name(state[MOMENTUM].dtype)
            where = _ON_HOST if name in OFFLOADED.get(muon.config.offload, ()) else ""
            sizes["master" if of_master else "momentum", form + where] += tensor.nbytes
    if not count:
        return []
    parts = ", ".join(f"{what} {form} {_number(size / count)}" for (what, form), size in sizes.items())
    owners = "; master and momentum at a weight's owner" if any(each.owned for each in held) else ""
    on_host = sum(size for (_, form), size in sizes.items() if form.endswith(_ON_HOST))
    near = f"{_number((sizes.total() - on_host) / count)} bytes a parameter"
    if on_host:
        near += f" and {_number(on_host / count)} on the host"
    return [f"Muon's weights: {near} ({parts}){owners}"]


_ON_HOST = " on the host"


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
