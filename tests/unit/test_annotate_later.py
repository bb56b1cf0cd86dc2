"""Modules of later versions of Megatron-Core, by their attributes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_muon import ConfigError
from megatron_muon.routing import _is_nonlinear_or_embedding, annotate
from megatron_muon.routing.layout import SCALAR
from megatron_muon.routing.predicate import exclusion_reason
from tests.unit.small_modules import (
    gated_delta_net,
    megatron_class,
    options,
)


def by_rule(weight: Any) -> tuple[list[str], list[str]]:
    """Names of the sections that are matrices, and of those of the scalar optimizer."""
    scalar = [section.name for section in weight.matrix_layout.sections if section.rule == SCALAR]
    return [section.name for section in weight.matrix_layout.sections if section.name not in scalar], scalar


GDN_2 = (("query", "key", "value", "z", "f", "b", "w"), (16, 16, 32, 32, 16, 16, 32), "GatedDeltaNet2")
KDA = (("query", "key", "value", "g", "gate"), (16, 16, 16, 16, 16), "KimiDeltaAttention")
KDA_LOW_RANK = (("query", "key", "value"), (16, 16, 16), "KimiDeltaAttention")


class TestLaterModules:
    @pytest.mark.parametrize("upstream_tag", [False, True])
    @pytest.mark.parametrize(
        "table,matrices,scalar",
        [
            (GDN_2, ["q", "k", "v", "z"], ["f", "b", "w"]),
            (KDA, ["q", "k", "v", "z"], ["g"]),
            (KDA_LOW_RANK, ["q", "k", "v"], []),
        ],
    )
    def test_gated_delta_nets(
        self, table: tuple[Any, ...], matrices: list[str], scalar: list[str], upstream_tag: bool
    ) -> None:
        module = gated_delta_net(*table, upstream_tag=upstream_tag)
        weight = module.in_proj.weight
        annotate(module)
        assert _is_nonlinear_or_embedding(weight), "the default"
        assert not _is_nonlinear_or_embedding(module.out_proj.weight)
        annotate(module, options(gdn_in_proj="split"))
        assert not _is_nonlinear_or_embedding(weight), "asked for, so it outweighs use_muon = False"
        assert by_rule(weight) == (matrices, scalar)
        annotate(module, options(gdn_in_proj="per_head"))
        heads = {section.name: section.matrix_rows for section in weight.matrix_layout.sections}
        assert heads == {**dict.fromkeys(matrices, 8), **dict.fromkeys(scalar, 0)}

    def test_projections_beside_in_proj_of_kimi_delta_attention(self) -> None:
        module = gated_delta_net(*KDA_LOW_RANK)
        module.beta_proj = torch.nn.Linear(12, 2, bias=False)
        module.f_a_proj = torch.nn.Linear(12, 4, bias=False)
        module.f_b_proj = torch.nn.Linear(4, 16, bias=False)
        annotate(module)
        assert exclusion_reason(module.beta_proj.weight) == "write strengths of heads", "one row a head"
        for layer in (module.f_a_proj, module.f_b_proj):
            assert layer.weight.matrix_layout.kind == "whole" and not _is_nonlinear_or_embedding(layer.weight)

    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_gated_delta_product(self, steps: int) -> None:
        """Upstream gives partition_sizes one entry a Householder step for v, k and b, and says use_muon = False."""
        sizes = [16, *[16] * steps, *[8] * steps, 8, *[2] * steps, 2]
        module = megatron_class("GatedDeltaProductMixer", "ssm.gated_delta_product")()
        module.num_householder = steps
        module.in_proj = torch.nn.Linear(12, sum(sizes), bias=False)
        weight: Any = module.in_proj.weight
        weight.partition_sizes, weight.use_muon = sizes, False
        annotate(module)
        assert exclusion_reason(weight) == "fused gated delta product in_proj"
        annotate(module, options(gdn_in_proj="split"))
        assert not _is_nonlinear_or_embedding(weight)
        each = range(1, steps + 1)
        matrices = ["z", *(f"v{i}" for i in each), *(f"k{i}" for i in each), "q"]
        assert by_rule(weight) == (matrices, [*(f"b{i}" for i in each), "a"])
        assert [section.rows for section in weight.matrix_layout.sections] == sizes
        with pytest.raises(ConfigError, match=r"in_proj\.weight \(gdp_in_proj\) cannot be split that way"):
            annotate(module, options(gdn_in_proj="per_head"))

    @pytest.mark.parametrize("sizes", [None, [16, 16, 8, 8]])
    def test_in_proj_without_the_table_that_its_kind_has(self, sizes: list[int] | None) -> None:
        module = megatron_class("MambaMixer", "ssm.mamba_mixer")()
        module.in_proj = torch.nn.Linear(12, 48, bias=False)
        if sizes:
            module.in_proj.weight.partition_sizes = sizes
        annotate(module)
        assert _is_nonlinear_or_embedding(module.in_proj.weight)
        with pytest.raises(ConfigError, match=rf"in_proj\.weight has {len(sizes or [])} partition_sizes"):
            annotate(module, options(mamba_in_proj="split"))

    def test_hyper_connections(self) -> None:
        n, hidden = 4, 8
        module = megatron_class("HyperConnectionModule", "transformer.hyper_connection")()
        module.n = n
        module.mapping_proj = torch.nn.Linear(n * hidden, n * n + 2 * n, bias=False)
        module.alpha = torch.nn.Parameter(torch.zeros(1))
        annotate(module)
        weight = module.mapping_proj.weight
        assert weight.matrix_layout.kind == "whole" and not _is_nonlinear_or_embedding(weight)
        annotate(module, options("mapping_proj.weight=split"))
        assert [(s.name, s.rows) for s in weight.matrix_layout.sections] == [("pre", 4), ("post", 4), ("res", 16)]
