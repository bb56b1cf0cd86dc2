"""Which layers of the models of ``examples/models`` are measured, at which layout."""

from __future__ import annotations

import dataclasses
import re

from tools.bench.cases import Case, WeightSpec
from tools.bench.model import case_of_model
from tools.gpu_check.report import repository

SIZES = (1, 8, 2, 4)
"""Tensor-parallel sizes: first those that tell most."""

LAYERS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "llama3_8b": (1, (0, 1), (0, 1, 2, 3)),
    "llama3_70b": (1, (0,), (0, 1, 2, 3)),
    "qwen3_30b_a3b": (8, (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)),
    "deepseek_v3": (64, (0, 3), (0, 3)),
    "nemotron_h_8b": (1, (0, 1, 2, 3, 7), (0, 1, 2, 3, 4, 5, 6, 7)),
    "qwen3_next_80b_a3b": (32, (0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6, 7)),
}
"""Model -> expert-parallel size (its file's, or what leaves a rank few experts), and numbers of layers: in one process,
where several optimizers must fit into memory, and on one of several ranks, where work is to be shared out."""


def case_of(model: str, tp: int, small: bool = False) -> Case:
    """The weights of a rank.

    Args:
        model: key of :data:`LAYERS`.
        tp: tensor-parallel size.
        small: a tenth of each dimension, about, for CPUs.
    """
    ep, one, several = LAYERS[model]
    case = case_of_model(str(repository() / "examples" / "models" / f"{model}.args"), tp, ep, None)
    layers = one if tp == 1 else several
    kept = tuple(weight for weight in case.weights if _layer(weight.name) in layers)
    if small:
        kept = tuple(shrunk for weight in kept[:6] if (shrunk := _small(weight)) is not None)
    return dataclasses.replace(case, weights=kept)


def _layer(name: str) -> int | None:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else None


_SMALLER = 16


def _small(weight: WeightSpec) -> WeightSpec | None:
    """A weight with fewer rows and columns, of the same kind; None if its parts cannot be divided."""
    layout, shape = weight.layout, list(weight.shape)
    if any(each.rows % _SMALLER or each.matrix_rows % _SMALLER for each in layout.sections):
        return None
    if shape[-1] % (8 * _SMALLER):
        return None
    sections = tuple(
        dataclasses.replace(each, rows=each.rows // _SMALLER, matrix_rows=each.matrix_rows // _SMALLER)
        for each in layout.sections
    )
    shape[-2:] = [size // _SMALLER for size in shape[-2:]]
    return dataclasses.replace(weight, shape=tuple(shape), layout=dataclasses.replace(layout, sections=sections))
