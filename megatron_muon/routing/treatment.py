"""What a rule knows about one weight: the ways in which it can be split, and which of them is in effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section

WHOLE_MATRIX = "whole"
SPLIT = "split"
PER_HEAD = "per_head"
ADAM = "adam"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Treatment:
    """How one weight can be treated.

    Attributes:
        kind: what the weight is, for messages (``qkv``, ``glu``, ``linear``, ...).
        choice: the way in effect: a key of ``variants``, :data:`ADAM`, or :data:`UNKNOWN` for a weight that no rule
            can classify.
        variants: the layouts that the weight can take, by name.
        reason: why it is the scalar optimizer's, if it is.
        problem: why a variant that its kind has is missing here, for the error of one who asks for it.
        forced: whether ``choice`` was asked for by an option of its own, and so outweighs Megatron's ``use_muon``.
        tags: further attributes to set on the parameter.
        option: the field of :class:`MuonConfig` that ``choice`` comes from, if one does.
    """

    kind: str
    choice: str
    variants: Mapping[str, MatrixLayout] = field(default_factory=lambda: {WHOLE_MATRIX: WHOLE})
    reason: str = ""
    problem: str = ""
    forced: bool = False
    tags: Mapping[str, Any] = field(default_factory=dict)
    option: str = ""


WeightTreatment = tuple[torch.Tensor, Treatment]
Rule = Callable[[Any, MuonConfig], Iterable[WeightTreatment]]
"""Treatments of weights of one module; takes the module and the options."""

OF_MEGATRON: dict[str, Rule] = {}
"""Rules by the name of a class of Megatron-Core: importing the classes would import all optional modules."""


def rule[R: Rule](*classes: str) -> Callable[[R], R]:
    """Decorator: this is the rule of these classes of Megatron-Core, and of those that derive from them."""

    def register(function: R) -> R:
        OF_MEGATRON.update(dict.fromkeys(classes, function))
        return function

    return register


def fused(
    kind: str,
    weight: torch.Tensor,
    choice: str,
    sections: Iterable[Section],
    *,
    rows: int,
    source: str,
    heads: Mapping[str, int] | None = None,
    reason: str = "",
    forced: bool = False,
    option: str = "",
    transposed: bool = False,
) -> Treatment:
    """The treatment of a fused weight: whole, split, and per head where heads are given.

    Args:
        kind: what the weight is.
        weight: it (or its shard): a matrix, or a 3-D stack of experts.
        choice: the way in effect.
        sections: of one period, for the split.
        rows: that the module's config implies; the splits are offered only if the weight has so many.
        source: where ``rows`` comes from, for the error message.
        heads: section name -> rows of one matrix; a section that is not named stays one matrix.
        reason: why it is the scalar optimizer's, if it is.
        forced: see :class:`Treatment`.
        option: see :class:`Treatment`.
        transposed: whether it has (inputs, outputs), see :class:`megatron_muon.routing.layout.MatrixLayout`.
    """
    stacked = weight.dim() == 3
    variants = {WHOLE_MATRIX: MatrixLayout("whole", stacked=stacked, transposed=transposed)}
    *_, own_rows, _ = variants[WHOLE_MATRIX].seen_shape(weight.shape)
    if own_rows != rows:
        problem = f"has {own_rows} rows, but {source} implies {rows}"
        return Treatment(kind, choice, variants, reason, problem, forced, option=option)
    sections = tuple(sections)
    variants[SPLIT] = MatrixLayout(kind, sections, stacked, transposed=transposed)
    if heads:
        each = tuple(
            Section(section.name, section.rows, section.rule, heads.get(section.name, 0)) for section in sections
        )
        variants[PER_HEAD] = MatrixLayout(kind, each, stacked, transposed=transposed)
    return Treatment(kind, choice, variants, reason, "", forced, option=option)
