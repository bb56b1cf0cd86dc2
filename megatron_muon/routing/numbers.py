"""Learning rate and weight decay of the param groups, for the report: from the groups, since any override may be wrong.

A rate that is meant for Muon's weights is often keyed on the number of dimensions. It then reaches weights that are
matrices and Adam's (embeddings, fused projections), at which Muon's rate can be ten times too high.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.routing.layout import layout_of
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding
from megatron_muon.routing.wrappers import pattern

_SHOWN = 3
"""Names of weights in a line."""


@dataclass(frozen=True, order=True)
class Numbers:
    """What a weight, or all that share its pattern, is updated with."""

    muon: bool  # whether by Muon's rule
    rate: float  # peak learning rate
    decay: float  # weight decay
    name: str  # pattern of names; of rows of a weight under the scalar optimizer's rule it says so
    vector: bool  # whether it has no more than one dimension


def numbers_of(name: str, param: torch.nn.Parameter, group: Mapping[str, Any]) -> Iterable[Numbers]:
    """The numbers of a weight, and of its rows under the scalar optimizer's rule; its route is on it.

    Megatron-Core's schedule takes rate and decay from entries of the param group, if it has them.
    """
    muon = not _is_nonlinear_or_embedding(param)
    rate = group.get("max_lr")
    rate = group["lr"] if rate is None else rate
    decay = group.get("end_wd", group["weight_decay"]) * group.get("wd_mult", 1.0)
    # Groups that differ in digits that do not matter are one to the reader.
    yield Numbers(muon, _rounded(rate), _rounded(decay), pattern(name), param.dim() < 2)
    if muon and layout_of(param).has_scalar_rows:
        rate, decay = rate * group["scalar_lr_mult"], decay * group["scalar_wd_mult"]
        yield Numbers(False, _rounded(rate), _rounded(decay), f"{pattern(name)} (its rows)", False)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def describe_numbers(found: Collection[Numbers], options: MuonConfig) -> list[str]:
    """The numbers of a model's weights in words: a line for each that differ, and what looks wrong."""
    lines: list[str] = []
    for muon, by in ((True, "muon"), (False, options.scalar_optimizer)):
        names: dict[tuple[float, float], list[str]] = {}
        for each in sorted(set(found)):
            if each.muon is muon:
                names.setdefault((each.rate, each.decay), []).append(each.name)
        for (rate, decay), members in names.items():
            which = f": {_some(members)}" if len(names) > 1 else ""
            lines.append(f"{by}: learning rate {rate:g}, weight decay {decay:g}{which}")
    return [*lines, *_with_rates_of_muon(found, options.scalar_optimizer)]


def _with_rates_of_muon(found: Collection[Numbers], scalar: str) -> list[str]:
    """Matrices of the scalar optimizer that have Muon's rate, where its vectors have another."""
    theirs = {each.rate for each in found if each.muon}
    own = {each.rate for each in found if not each.muon and each.vector}
    names = sorted({each.name for each in found if not each.muon and each.rate in theirs})
    if not names or not own or own & theirs:
        return []
    return [
        f"WARNING {scalar} updates {_some(names)} with muon's learning rate, while its vectors have "
        f"{', '.join(f'{rate:g}' for rate in sorted(own))}: the override that gives muon's weights their rate matches "
        "them too. Key it on megatron.core.optimizer.layer_wise_optimizer.is_managed_by_layer_wise_optimizer, which "
        "is true of muon's weights alone, not on the number of dimensions."
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
