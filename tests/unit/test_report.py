"""The table of who updates what: its columns, counts and totals."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from megatron_muon import MuonConfig
from megatron_muon.plugin.variants import describe
from megatron_muon.routing import annotate
from megatron_muon.routing.layout import SCALAR, WHOLE, Block, MatrixLayout, Section
from megatron_muon.routing.report import Route, collect, pattern, render

QKV = MatrixLayout("qkv", (Section("q", 16), Section("k", 8), Section("v", 8)))
PER_HEAD = MatrixLayout("qkv", (Section("q", 16, matrix_rows=8), Section("k", 8, matrix_rows=8)))
MIXED = MatrixLayout("in_proj", (Section("q", 16), Section("b", 2, SCALAR), Section("a", 2, SCALAR)))
MATRIX = Route("a.weight", (32, 8), "", (Block("whole", "orthogonalize", 1, 32, 8),), "")
VECTOR = Route("a.bias", (32,), "", (), "1-D")


def parameter(*shape: int, layout: MatrixLayout | None = None, **attributes: Any) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.zeros(shape))
    if layout is not None:
        attributes["matrix_layout"] = layout
    vars(param).update(attributes)
    return param


def one(param: torch.nn.Parameter, **sizes: int) -> Route:
    (route,) = collect([("module.decoder.layers.3.weight", param)], MuonConfig(), **sizes)
    return route


def row(param: torch.nn.Parameter, options: MuonConfig | None = None, **sizes: int) -> str:
    """The only line of the table, columns separated by one space."""
    text = render([one(param, **sizes)], options or MuonConfig())
    return " ".join(text.splitlines()[2].split())


class TestCollect:
    def test_shape_is_that_of_the_whole_weight(self) -> None:
        rows = parameter(16, 8, tensor_model_parallel=True, partition_dim=0, layout=WHOLE)
        columns = parameter(16, 8, tensor_model_parallel=True, partition_dim=1, layout=WHOLE)
        assert (one(rows, tp_size=4).shape, one(rows, tp_size=4).divided) == ((64, 8), "rows / 4")
        assert (one(columns, tp_size=4).shape, one(columns, tp_size=4).divided) == ((16, 32), "columns / 4")
        assert (one(rows).shape, one(rows).divided) == ((16, 8), "")

    def test_experts_are_divided_by_their_own_group(self) -> None:
        expert = parameter(16, 8, tensor_model_parallel=True, partition_dim=0, expert_tp=True, layout=WHOLE)
        assert one(expert, tp_size=4).shape == (16, 8)
        assert one(expert, tp_size=4, expert_tp_size=2).shape == (32, 8)

    def test_duplicated_weights_are_whole(self) -> None:
        """TransformerEngine sets partition_dim on weights that every rank has whole, without tensor_model_parallel."""
        route = one(parameter(16, 8, tensor_model_parallel=False, partition_dim=0, layout=WHOLE), tp_size=4)
        assert (route.shape, route.divided) == ((16, 8), "")

    def test_stack_of_experts(self) -> None:
        """partition_dim counts the dimensions of one expert's matrix."""
        layout = MatrixLayout("glu", (Section("gate", 8), Section("up", 8)), stacked=True)
        stack = parameter(3, 16, 8, tensor_model_parallel=True, partition_dim=0, expert_tp=True, layout=layout)
        route = one(stack, expert_tp_size=2)
        assert route.shape == (3, 32, 8)
        assert [(block.name, block.count, block.rows, block.columns) for block in route.blocks] == [
            ("gate", 3, 16, 8),
            ("up", 3, 16, 8),
        ]

    def test_blocks_are_those_of_the_whole_weight(self) -> None:
        param = parameter(32, 8, tensor_model_parallel=True, partition_dim=0, layout=QKV)
        assert [(block.name, block.rows) for block in one(param, tp_size=2).blocks] == [("q", 32), ("k", 16), ("v", 16)]

    def test_frozen_weights_are_left_out(self) -> None:
        param = parameter(16, 8)
        param.requires_grad_(False)
        assert collect([("weight", param)], MuonConfig()) == []

    @pytest.mark.parametrize(
        "param,reason",
        [
            (parameter(8), "1-D"),
            (parameter(8, 4, 2), "3-D"),
            (parameter(1, 8), "a single row or column"),
            (parameter(8, 8, is_embedding_or_output_parameter=True), "embedding or output layer"),
            (parameter(8, 8, skip_orthogonalization=True), "tagged skip_orthogonalization"),
            (parameter(8, 8, use_muon=False), "tagged use_muon = False"),
        ],
    )
    def test_reasons(self, param: torch.nn.Parameter, reason: str) -> None:
        route = one(param)
        assert (route.reason, route.muon, route.blocks) == (reason, False, ())
        assert route.scalar_numel == route.numel == param.numel()

    def test_numbers_of_elements(self) -> None:
        route = one(parameter(40, 8, layout=MIXED))
        assert (route.numel, route.scalar_numel) == (320, 2 * 4 * 8)


class TestRender:
    def test_columns(self) -> None:
        text = render([MATRIX, VECTOR], MuonConfig())
        header, rule, first, second = text.splitlines()[:4]
        assert header.split() == ["weight", "count", "parameters", "shape", "divided", "optimizer", "as", "scale"]
        assert set(rule) == {"-", " "}
        starts = [header.index(name) for name in ("weight", "count", "parameters", "shape", "optimizer", "as", "scale")]
        assert [rule[start - 1 : start + 1] for start in starts[1:]] == [" -"] * 6, "columns line up"
        cells = [first[start:].split("  ")[0] for start in starts]
        assert cells == ["a.weight", "1", "256", "32 x 8", "muon", "whole 32 x 8", "5.66"]
        assert second.split() == ["a.bias", "1", "32", "32", "adam", "1-D"]

    def test_equal_weights_share_a_line(self) -> None:
        lines = render([MATRIX, VECTOR, MATRIX, MATRIX], MuonConfig()).splitlines()
        assert [line.split()[:3] for line in lines[2:4]] == [["a.weight", "3", "768"], ["a.bias", "1", "32"]]
        assert lines[4:] == ["muon: 768 parameters in 3 weights", "adam: 32 parameters in 1 weights"]

    def test_other_shape_is_another_line(self) -> None:
        other = Route("a.weight", (16, 8), "", (Block("whole", "orthogonalize", 1, 16, 8),), "")
        assert len(render([MATRIX, other], MuonConfig()).splitlines()) == 2 + 2 + 2

    @pytest.mark.parametrize(
        "mode,factor,scale",
        [
            ("spectral", 1.0, "5.66"),
            ("spectral", 0.2, "1.13"),
            ("shape_scaling", 1.0, "2"),
            ("unit_rms_norm", 0.5, "1"),
            ("aspect_ratio", 1.0, "2"),
            ("none", 0.25, "0.25"),
        ],
    )
    def test_scale_of_a_matrix(self, mode: str, factor: float, scale: str) -> None:
        line = row(parameter(32, 8, layout=WHOLE), MuonConfig(scale_mode=mode, extra_scale_factor=factor))
        assert line.split()[-1] == scale

    def test_scale_is_that_of_each_block(self) -> None:
        """Of the logical matrix, never of the shard or of the fused weight."""
        param = parameter(32, 8, tensor_model_parallel=True, partition_dim=0, layout=QKV)
        assert row(param, MuonConfig(scale_mode="spectral"), tp_size=2).endswith(
            "q 32 x 8, k 16 x 8, v 16 x 8 5.66, 4, 4"
        )
        assert row(param, MuonConfig(scale_mode="none"), tp_size=2).endswith("v 16 x 8 1"), "equal ones are told once"

    def test_heads_are_counted(self) -> None:
        assert "q 4 of 8 x 8, k 2 of 8 x 8" in row(parameter(48, 8, layout=PER_HEAD))

    def test_scalar_rows(self) -> None:
        line = row(parameter(40, 8, layout=MIXED), MuonConfig(scale_mode="spectral"))
        assert line.endswith("q 32 x 8, b 4 x 8 adam, a 4 x 8 adam 5.66, -, -")
        assert "b 4 x 8 lion" in row(parameter(40, 8, layout=MIXED), MuonConfig(scalar_optimizer="lion"))

    def test_totals_count_scalar_rows_where_they_belong(self) -> None:
        routes = [one(parameter(40, 8, layout=MIXED)), MATRIX, VECTOR]
        text = render(routes, MuonConfig())
        assert "muon: 512 parameters in 2 weights" in text, "256 of the mixed weight and 256 of the other"
        assert "adam: 96 parameters in 1 weights, 64 in rows of muon's weights" in text
        assert "lion: 96 parameters" in render(routes, MuonConfig(scalar_optimizer="lion"))

    def test_totals_of_large_models_are_grouped(self) -> None:
        big = Route("w", (40000, 1000), "", (Block("whole", "orthogonalize", 1, 40000, 1000),), "")
        assert "muon: 40,000,000 parameters in 1 weights" in render([big], MuonConfig())

    def test_overrides_and_notes_end_the_table(self) -> None:
        model = torch.nn.ModuleList([torch.nn.Linear(4, 6), torch.nn.Linear(6, 4), torch.nn.Linear(4, 4)])
        options = MuonConfig(param_rule=("0.*=adam", "1.weight=adam", "2.weight=whole"))
        annotate(model, options)
        lines = render(collect(model.named_parameters(), options), options, notes=["a note"]).splitlines()
        assert lines[-4:] == [
            "--muon-param-rule 0.*=adam: 2 weights",
            "--muon-param-rule 1.weight=adam: 1 weights",
            "--muon-param-rule 2.weight=whole: 1 weights",
            "a note",
        ]
        assert "--muon-param-rule 1.weight=adam" in " ".join(lines[2:-6]), "and the line of the weight says why"


def test_from_a_module_to_the_table() -> None:
    """Megatron's self-attention by its attributes: two groups of two heads of 8."""
    attention: Any = type("SelfAttention", (torch.nn.Module,), {"__module__": "megatron.core.transformer.attention"})()
    attention.config = types.SimpleNamespace(num_attention_heads=4, num_query_groups=2, kv_channels=8)
    attention.world_size = 1
    attention.linear_qkv = torch.nn.Linear(32, 64, bias=False)
    options = MuonConfig(qkv="per_head")
    annotate(attention, options)
    text = render(collect(attention.named_parameters(), options), options)
    assert "q 4 of 8 x 32, k 2 of 8 x 32, v 2 of 8 x 32  5.66" in text


@pytest.mark.parametrize(
    "name,expected",
    [
        ("module.module.decoder.layers.3.mlp.linear_fc1.weight", "decoder.layers.*.mlp.linear_fc1.weight"),
        ("decoder.layers.12.mlp.experts.linear_fc1.weight7", "decoder.layers.*.mlp.experts.linear_fc1.weight*"),
        (
            "decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight",
            "decoder.layers.*.mlp.experts.local_experts.*.linear_fc2.weight",
        ),
        ("0.weight", "0.weight"),
        ("conv1d.weight", "conv1d.weight"),
    ],
)
def test_pattern(name: str, expected: str) -> None:
    assert pattern(name) == expected


# What is said of variants.


def described(optimizer: str, **options: Any) -> str:
    settings = types.SimpleNamespace(
        optimizer=optimizer,
        lr=0.01,
        weight_decay=0.1,
        adaptive_muon_moment2_method="normuon",
        adaptive_muon_beta2=0.9,
        adaptive_muon_eps=1e-8,
    )
    return "\n".join(describe(settings, MuonConfig(**options)))


def test_what_variants_say_of_themselves() -> None:
    """Nothing that does not act."""
    plain = described("muon", scale_mode="moonlight")
    assert "update scale moonlight x 1" in plain and "weight decay decoupled" in plain
    assert "second moments: normuon, beta2 0.9, eps 1e-08" in described("dist_adaptive_muon")
    sphere = described("spectral_sphere")
    assert "spectral norm 2 sqrt(m / n)" in sphere and "tolerance 0.1, 7 iterations of Newton-Schulz" in sphere
    assert "no weight decay" in sphere and "update scale" not in sphere and "decoupled" not in sphere
    assert "the norm of each at the start" in described("spectral_sphere", sphere_radius=0.0)
    assert "1 iteration, without the multiplier (MuonSphere)" in described("spectral_sphere", sphere_tolerance=1.0)
    ball = described("muon", variant="hyperball", scale_mode="none")
    assert "hyperball: weights keep their Frobenius norm" in ball and "decoupled" not in ball
    assert "polargrad; update scale none x 1" in described("muon", variant="polargrad", scale_mode="none")


def test_scales_of_weights_that_keep_their_norm() -> None:
    route = one(parameter(32, 8, layout=WHOLE))
    (block,) = route.blocks
    assert route.scale(block, MuonConfig(), "spectral_sphere") == 2.0 * 2.0
    assert route.scale(block, MuonConfig(sphere_radius=0.0), "dist_spectral_sphere") is None
    assert route.scale(block, MuonConfig(variant="hyperball", scale_mode="none")) is None
    table = render([route], MuonConfig(), optimizer="spectral_sphere")
    assert table.splitlines()[2].endswith("  4")
