"""What users say that a weight is: by a ``--muon-param-rule``, or by a layout in code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from megatron_muon.choices import STACK, TRANSPOSED, TRANSPOSED_STACK, Rows, parse_form
from megatron_muon.config import flag
from megatron_muon.errors import ConfigError, sizes
from megatron_muon.routing.layout import ORTHOGONALIZE, SCALAR, MatrixLayout, Section
from megatron_muon.routing.treatment import SPLIT, WHOLE_MATRIX, Treatment

Layouts = Mapping[str, MatrixLayout | Sequence[Section]]
"""What fused weights of one's own are, by globs of their names: a layout, or the sections of one period of rows."""


def given_layout(
    name: str, param: torch.Tensor, claim: Treatment, layout: MatrixLayout | Sequence[Section]
) -> Treatment:
    """The treatment of a weight whose layout the user gives."""
    if not isinstance(layout, MatrixLayout):
        if isinstance(layout, str | Mapping) or not all(isinstance(each, Section) for each in layout):
            raise ConfigError(
                f"layouts: {name} has {layout!r}: give a sequence of megatron_muon.Section, such as "
                "(Section('q', 64), Section('k', 64), Section('v', 64))."
            )
        layout = MatrixLayout("fused", tuple(layout), stacked=param.dim() == 3)
    if param.dim() != layout.dims or not layout.fits(layout.seen_shape(param.shape)[-2]):
        raise ConfigError(
            f"layouts: {name} has shape {sizes(param.shape)}, which is no {layout.dims}-D weight with periods of "
            f"{layout.period} rows ({', '.join(f'{each.name} {each.rows}' for each in layout.sections)}). Mend its "
            "sections, or the name."
        )
    whole = dataclasses.replace(layout, kind="whole", sections=())
    return Treatment(layout.kind, SPLIT, {SPLIT: layout, WHOLE_MATRIX: whole}, forced=True, tags=claim.tags)


def said_by_rule(name: str, param: torch.Tensor, claim: Treatment, choice: str, rule: str) -> Treatment:
    """The treatment of a weight of which a ``param_rule`` says what it is: see :func:`parse_form`."""
    word, rows = parse_form(choice) or ("", ())
    stacked = word in (STACK, TRANSPOSED_STACK) or (word == SPLIT and param.dim() == 3)
    sections = tuple(_section(each) for each in rows)
    transposed = word in (TRANSPOSED, TRANSPOSED_STACK)
    layout = MatrixLayout("fused" if sections else "whole", sections, stacked=stacked, transposed=transposed)
    if param.dim() != layout.dims or not layout.fits(layout.seen_shape(param.shape)[-2]):
        raise ConfigError(
            f"{flag('param_rule')} {rule}: {name} has shape {sizes(param.shape)}, which is no {layout.dims}-D weight "
            f"whose rows ({'its last dimension' if transposed else 'the last dimension but one'}) are periods of "
            f"{layout.period}. {STACK} is (experts, outputs, inputs), {TRANSPOSED} (inputs, outputs), "
            f"{TRANSPOSED_STACK} (experts, inputs, outputs)."
        )
    return dataclasses.replace(claim, kind=layout.kind, choice=SPLIT, variants={SPLIT: layout}, forced=True)


def _section(rows: Rows) -> Section:
    return Section(rows.name, rows.rows, SCALAR if rows.adam else ORTHOGONALIZE, rows.each)
