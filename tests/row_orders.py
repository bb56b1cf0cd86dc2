"""In which order Megatron-Core puts the rows of its fused weights, written out row by row.

An order is a list with one :data:`Label` for each row of the whole weight, the shards of a tensor-parallel group put
together in rank order. It is made from the sizes of the model alone: what the package says about the same weight
(:class:`megatron_muon.routing.MatrixLayout`) is compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_muon.routing.layout import MatrixLayout
from tools.splitting import split

Label = tuple[str, int]
"""Name of a block, and which of its matrices a row belongs to (0 if it is one matrix)."""


def query_groups(heads: int, groups: int, head: int, *, gated: bool = False, per_head: bool = False) -> list[Label]:
    """``linear_qkv``: in each query group its q heads, (its gate heads,) a k head, a v head."""
    rows: list[Label] = []
    each = heads // groups
    for group in range(groups):
        for name in ("q", "gate") if gated else ("q",):
            for number in range(group * each, (group + 1) * each):
                rows += [(name, number if per_head else 0)] * head
        for name in ("k", "v"):
            rows += [(name, group if per_head else 0)] * head
    return rows


def heads_of_parts(heads: int, parts: Mapping[str, int], *, per_head: bool = False) -> list[Label]:
    """For each head the rows of each part: ``linear_kv`` (k, v), MLA's up projections (nope, rope)."""
    rows: list[Label] = []
    for number in range(heads):
        for name, count in parts.items():
            rows += [(name, number if per_head else 0)] * count
    return rows


def sections_of_ranks(ranks: int, sizes: Mapping[str, int], heads: Mapping[str, int] | None = None) -> list[Label]:
    """Each rank's part of every section, in order: ``in_proj``, gate and up.

    Args:
        ranks: of the tensor-parallel group.
        sizes: name -> rows of the whole section.
        heads: name -> rows of one head, for sections whose heads are matrices of their own.
    """
    rows: list[Label] = []
    for rank in range(ranks):
        for name, size in sizes.items():
            part = size // ranks
            head = (heads or {}).get(name, size)
            rows += [(name, (rank * part + row) // head) for row in range(part)]
    return rows


def consecutive(sizes: Mapping[str, int]) -> list[Label]:
    """One section after the other, whatever the ranks: MLA's down projections."""
    return sections_of_ranks(1, sizes)


def fused_latents(ranks: int, query: int, latent: int, rope: int) -> list[Label]:
    """``linear_qkv_down_proj``: each rank's part of the q latent, then its part of [kv latent; rotary key]."""
    key_value: list[Label] = [("kv_latent", 0)] * latent + [("k_rope", 0)] * rope
    part = len(key_value) // ranks
    rows: list[Label] = []
    for rank in range(ranks):
        rows += [("q_latent", 0)] * (query // ranks) + key_value[rank * part : (rank + 1) * part]
    return rows


def in_turns(names: Sequence[str], rows_at_a_time: int, rows: int) -> list[Label]:
    """``rows_at_a_time`` rows of each name in turn, up to ``rows`` rows: interleaved gate and up."""
    return [(names[row // rows_at_a_time % len(names)], 0) for row in range(rows)]


def matrices(order: Sequence[Label], weight: torch.Tensor) -> dict[Label, torch.Tensor]:
    """The logical matrices of a whole weight, (rows, columns) or (experts, rows, columns), by label."""
    rows: dict[Label, list[int]] = {}
    for index, label in enumerate(order):
        rows.setdefault(label, []).append(index)
    return {label: weight[..., indices, :] for label, indices in rows.items()}


def assemble(order: Sequence[Label], parts: Mapping[Label, torch.Tensor]) -> torch.Tensor:
    """The whole weight whose logical matrices are ``parts``: the inverse of :func:`matrices`."""
    taken = dict.fromkeys(parts, 0)
    rows = []
    for label in order:
        rows.append(parts[label][..., taken[label], :])
        taken[label] += 1
    return torch.stack(rows, dim=-2)


def matrices_by_layout(layout: MatrixLayout, weight: torch.Tensor) -> dict[Label, torch.Tensor]:
    """The same, as the package's layout has them."""
    found = {}
    for block, rows in zip(layout.blocks(weight.shape), split(layout, weight), strict=True):
        name = "whole" if not layout.sections else block.name
        if layout.sections and any(section.matrix_rows for section in layout.sections if section.name == name):
            found.update({(name, number): matrix for number, matrix in enumerate(rows.unbind(-3))})
        else:
            found[(name, 0)] = rows
    return found
