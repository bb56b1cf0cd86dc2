"""``in_proj`` of GatedDeltaNet and its kin, and of Mamba: projections and gates in one weight.

Each tensor-parallel rank holds its part of every section, in order. The rows that make the decay and the write strength
of a head (one row or a few) are no projection: as rows of a matrix they starve or dominate the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.routing.layout import ORTHOGONALIZE, SCALAR, Section
from megatron_muon.routing.rules.linear import fused_layer, weight_of
from megatron_muon.routing.treatment import ADAM, Treatment, WeightTreatment, fused, rule

_GDN_NAMES = {"query": "q", "key": "k", "value": "v", "z": "z", "gate": "z"}
"""Sections of GatedDeltaNet's ``in_proj`` that are projections (z: output gate), with their short names."""


@rule("_GDNBase")
def gated_delta_net(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """``in_proj`` by the module's own table of sections: GatedDeltaNet (q, k, v, z; beta, alpha), and of later versions
    of Megatron-Core GatedDeltaNet-2 (q, k, v, z; f, b, w) and Kimi's delta attention (q, k, v; g; z, or q, k, v alone,
    with ``beta_proj``, one row a head, beside it). ``out_proj`` is one matrix. See NVIDIA/Megatron-LM#5400.
    """
    write_strength = weight_of(getattr(module, "beta_proj", None))
    if write_strength is not None:
        yield write_strength, Treatment("beta_proj", ADAM, reason="write strengths of heads")
    yield from fused_layer(getattr(module, "in_proj", None), lambda weight: _by_table(module, weight, options))


def _by_table(module: Any, weight: torch.Tensor, options: MuonConfig) -> Treatment:
    sections = [
        Section(_GDN_NAMES.get(name, name), rows, ORTHOGONALIZE if name in _GDN_NAMES else SCALAR)
        for name, rows in zip(module.in_proj_split_names, module.in_proj_split_sections, strict=True)
    ]
    heads = {"q": module.key_head_dim, "k": module.key_head_dim, "v": module.value_head_dim, "z": module.value_head_dim}
    return _in_proj("gdn_in_proj", "GatedDeltaNet", options.gdn_in_proj, weight, sections, heads)


@rule("MambaMixer", "GatedDeltaProductMixer")
def partitioned_in_proj(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """``in_proj`` whose weight carries ``partition_sizes``: Mamba's mixer, and the gated delta product of later
    versions of Megatron-Core.
    """
    yield from fused_layer(getattr(module, "in_proj", None), lambda weight: _partitioned(module, weight, options))


def _partitioned(module: Any, weight: torch.Tensor, options: MuonConfig) -> Treatment:
    sizes: Sequence[int] = getattr(weight, "partition_sizes", ())
    householder = getattr(module, "num_householder", None)
    if householder is None:
        kind, layer, choice, names = "mamba_in_proj", "Mamba", options.mamba_in_proj, _MAMBA
    else:
        kind, layer, choice = "gdp_in_proj", "gated delta product", options.gdn_in_proj
        names = _product_names(householder)
    if len(names) != len(sizes):
        problem = f"has {len(sizes)} partition_sizes, but its kind has the sections {', '.join(names)}"
        forced, option = choice != ADAM, _option(kind)
        return Treatment(kind, choice, reason=_reason(layer), problem=problem, forced=forced, option=option)
    sections = [
        Section(name, rows, SCALAR if name.rstrip("0123456789") in _GATES else ORTHOGONALIZE)
        for name, rows in zip(names, sizes, strict=True)
    ]
    return _in_proj(kind, layer, choice, weight, sections, None)


_MAMBA: tuple[str, ...] = ("z", "x", "B", "C", "dt")
_GATES = ("dt", "b", "a")


def _product_names(householder: int) -> tuple[str, ...]:
    """z, then v and k of each Householder step, q, b of each step, a."""
    steps = range(1, householder + 1)
    return ("z", *(f"v{i}" for i in steps), *(f"k{i}" for i in steps), "q", *(f"b{i}" for i in steps), "a")


def _in_proj(
    kind: str, layer: str, choice: str, weight: torch.Tensor, sections: list[Section], heads: dict[str, int] | None
) -> Treatment:
    return fused(
        kind,
        weight,
        choice,
        sections,
        rows=sum(section.rows for section in sections),
        source=f"its table of sections ({', '.join(f'{section.name} {section.rows}' for section in sections)})",
        heads=heads,
        reason=_reason(layer),
        forced=choice != ADAM,
        option=_option(kind),
    )


def _reason(layer: str) -> str:
    return f"fused {layer} in_proj"


def _option(kind: str) -> str:
    """Which option decides: the gated delta product goes with GatedDeltaNet."""
    return "mamba_in_proj" if kind == "mamba_in_proj" else "gdn_in_proj"
