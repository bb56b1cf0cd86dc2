"""What all ranks of a model know of one measured step, weight by weight: what alarms judge and records sum up."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["Row", "Table", "class_of", "layer_of"]

Spread = tuple[float, float, float]
"""Least, mean, largest."""


@dataclass(frozen=True, slots=True)
class Row:
    """The matrices of one block of a weight, in the whole model.

    Attributes:
        matrices: how many.
        numbers: those of :data:`megatron_muon.monitor.schema.STATS` that were measured, over its matrices.
    """

    matrices: int
    numbers: dict[str, Spread]


@dataclass(frozen=True)
class Table:
    """Numbers of one measured step, the same on all ranks of the model.

    Attributes:
        iteration: of the step.
        rows: by the weight's name in the whole model, with the block of its rows if it has several:
            ``decoder.layers.3.mlp.experts.linear_fc1.weight7[gate]``. Layers and experts are numbered over all ranks.
        times: over ranks, by the names of :data:`megatron_muon.monitor.schema.TIMES`.
        rates: in force: the largest of Muon's param groups (``lr``, ``weight_decay``) and of the others
            (``scalar_lr``).
        max_attention_logit: of QK-clip's last measured step; None if nobody measures.
        heads_clipped: likewise; None if nobody clips.
    """

    iteration: int
    rows: dict[str, Row] = field(default_factory=dict)
    times: dict[str, Spread] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    max_attention_logit: float | None = None
    heads_clipped: int | None = None


_NUMBERS = re.compile(r"(?<=\.)\d+(?=[.\[]|$)|(?<=weight)\d+(?=\[|$)")
_LAYER = re.compile(r"(?:^|\.)layers\.\d+(?=\.)")


def class_of(name: str) -> str:
    """The class of a row: ``decoder.layers.3.mlp.experts.linear_fc1.weight7[gate]`` with ``*`` for each number."""
    return _NUMBERS.sub("*", name)


def layer_of(name: str) -> str:
    """The class of a row with the numbers of its layers: those of experts are ``*``."""
    kept = iter(_LAYER.findall(name))
    return re.sub(r"(?:^|\.)layers\.\*(?=\.)", lambda _: next(kept), class_of(name))
