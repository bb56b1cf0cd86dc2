"""Split and merge of fused weights."""

from __future__ import annotations

import pytest
import torch

from megatron_muon.routing.layout import ORTHOGONALIZE, SCALAR, WHOLE, Block, MatrixLayout, Section, layout_of
from tests import row_orders
from tests.row_orders import Label
from tools.splitting import merge, split

QKV = MatrixLayout("qkv", (Section("q", 6), Section("gate", 6), Section("k", 3), Section("v", 3)))
PER_HEAD = MatrixLayout("qkv", tuple(Section(section.name, section.rows, matrix_rows=3) for section in QKV.sections))
MIXED_HEADS = MatrixLayout("kv", (Section("k", 4, matrix_rows=2), Section("v", 4)))
GLU = MatrixLayout("glu", (Section("gate", 18), Section("up", 18)))
TURNS = MatrixLayout("glu", (Section("gate", 2), Section("up", 2)))
GATES = MatrixLayout(
    "in_proj", (Section("q", 8), Section("z", 4), Section("beta", 3, SCALAR), Section("alpha", 3, SCALAR))
)
GATE_BETWEEN = MatrixLayout("in_proj", (Section("q", 8), Section("dt", 3, SCALAR), Section("z", 7)))
# One rank's rows of [q latent; kv latent and k rope] after the other's: names appear again in one period.
REPEATED = MatrixLayout(
    "down",
    (
        Section("q_latent", 6),
        Section("kv_latent", 3),
        Section("q_latent", 6),
        Section("kv_latent", 1),
        Section("k_rope", 2),
    ),
)


def _k_heads_v(first: int, second: int) -> list[Label]:
    return [("k", first)] * 2 + [("k", second)] * 2 + [("v", 0)] * 4


# name -> (layout, the label of each row of a whole weight)
LAYOUTS: dict[str, tuple[MatrixLayout, list[Label]]] = {
    "whole": (WHOLE, [("whole", 0)] * 36),
    "qkv": (QKV, row_orders.query_groups(4, 2, 3, gated=True)),
    "per_head": (PER_HEAD, row_orders.query_groups(4, 2, 3, gated=True, per_head=True)),
    "heads_of_k_alone": (MIXED_HEADS, [*_k_heads_v(0, 1), *_k_heads_v(2, 3)]),
    "glu_of_one_rank": (GLU, row_orders.sections_of_ranks(1, {"gate": 18, "up": 18})),
    "glu_of_two_ranks": (GLU, row_orders.sections_of_ranks(2, {"gate": 36, "up": 36})),
    "glu_in_turns": (TURNS, row_orders.in_turns(("gate", "up"), 2, 36)),
    "scalar_rows": (GATES, row_orders.sections_of_ranks(2, {"q": 16, "z": 8, "beta": 6, "alpha": 6})),
    "scalar_rows_between": (GATE_BETWEEN, row_orders.sections_of_ranks(2, {"q": 16, "dt": 6, "z": 14})),
    "repeated_names": (REPEATED, row_orders.fused_latents(2, 12, 4, 2)),
}


def _weight(rows: int, columns: int = 5, experts: int | None = None) -> torch.Tensor:
    shape = (rows, columns) if experts is None else (experts, rows, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_split_gives_each_matrix_its_rows_and_merge_undoes_it(name: str, experts: int | None) -> None:
    layout, order = LAYOUTS[name]
    layout = layout if experts is None else layout.stack()
    weight = _weight(len(order), experts=experts)
    expected, found = row_orders.matrices(order, weight), row_orders.matrices_by_layout(layout, weight)
    assert set(found) == set(expected)
    assert list(found) == sorted(found, key=lambda label: order.index((label[0], 0))), "by first appearance"
    for label, matrix in expected.items():
        assert torch.equal(found[label], matrix), label
    merged = merge(layout, split(layout, weight))
    assert torch.equal(merged, weight) and merged.is_contiguous()


@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_tell_the_shapes_of_the_split(name: str, experts: int | None) -> None:
    layout, order = LAYOUTS[name]
    layout = layout if experts is None else layout.stack()
    weight = _weight(len(order), experts=experts)
    blocks = layout.blocks(weight.shape)
    for block, part in zip(blocks, split(layout, weight), strict=True):
        assert part.shape[-2:] == (block.rows, block.columns)
        assert part.numel() == block.numel == block.count * block.rows * block.columns
        assert part.shape[:-2].numel() == block.count
    assert sum(block.numel for block in blocks) == weight.numel()


def test_blocks_by_hand() -> None:
    assert WHOLE.blocks((4, 3)) == [Block("whole", ORTHOGONALIZE, 1, 4, 3)]
    assert WHOLE.stack().blocks((5, 4, 3)) == [Block("whole", ORTHOGONALIZE, 5, 4, 3)]
    assert PER_HEAD.blocks((36, 5)) == [
        Block("q", ORTHOGONALIZE, 4, 3, 5),
        Block("gate", ORTHOGONALIZE, 4, 3, 5),
        Block("k", ORTHOGONALIZE, 2, 3, 5),
        Block("v", ORTHOGONALIZE, 2, 3, 5),
    ]
    assert GATES.stack().blocks((2, 36, 5)) == [
        Block("q", ORTHOGONALIZE, 2, 16, 5),
        Block("z", ORTHOGONALIZE, 2, 8, 5),
        Block("beta", SCALAR, 2, 6, 5),
        Block("alpha", SCALAR, 2, 6, 5),
    ]


def test_shards_of_whole_periods_split_as_the_whole_does() -> None:
    weight = _weight(144, 4)
    for layout in (QKV, PER_HEAD, TURNS, GATES):
        for tp in (1, 2, 4):
            shards = [split(layout, shard) for shard in weight.chunk(tp)]
            for block, pieces in zip(split(layout, weight), zip(*shards, strict=True), strict=True):
                assert torch.equal(torch.cat(pieces), block)


@pytest.mark.parametrize("layout", [WHOLE, GLU, MatrixLayout("down", (Section("latent", 30), Section("rope", 6)))])
def test_split_of_one_period_is_views(layout: MatrixLayout) -> None:
    weight = _weight(36)
    for part in split(layout, weight):
        assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_split_of_heads_of_one_kind_is_a_view() -> None:
    weight = _weight(12)
    (heads,) = split(MatrixLayout("q", (Section("q", 3, matrix_rows=3),)), weight)
    assert heads.shape == (4, 3, 5) and heads.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_by_rule_are_views_that_part_the_weight(name: str, experts: int | None) -> None:
    """Writing through the views reaches every row once, and the rows of the other rule never."""
    layout, order = LAYOUTS[name]
    layout = layout if experts is None else layout.stack()
    scalar = {section.name for section in layout.sections if section.rule == SCALAR}
    weight = torch.zeros_like(_weight(len(order), experts=experts))
    for value, rule in ((1.0, ORTHOGONALIZE), (2.0, SCALAR)):
        for view in layout.rows_by_rule(weight, rule):
            view.add_(value)
    expected = torch.tensor([2.0 if label[0] in scalar else 1.0 for label in order])
    assert torch.equal(weight, expected[:, None].expand_as(weight))
    assert layout.has_scalar_rows is bool(scalar)


def test_rows_by_rule_join_neighbours() -> None:
    weight = _weight(36)
    assert [tuple(view.shape) for view in GATES.rows_by_rule(weight, ORTHOGONALIZE)] == [(2, 12, 5)]
    assert [tuple(view.shape) for view in GATES.rows_by_rule(weight, SCALAR)] == [(2, 6, 5)]
    assert [tuple(view.shape) for view in GATE_BETWEEN.rows_by_rule(weight, ORTHOGONALIZE)] == [(2, 8, 5), (2, 7, 5)]
    assert QKV.rows_by_rule(weight, ORTHOGONALIZE)[0] is weight and QKV.rows_by_rule(weight, SCALAR) == []


def test_broken_periods_are_refused() -> None:
    message = r"20 rows are not a multiple of the 18 rows of the qkv layout \(q 6, gate 6, k 3, v 3\)"
    with pytest.raises(ValueError, match=message):
        split(QKV, torch.zeros(20, 2))
    with pytest.raises(ValueError, match=message):
        QKV.blocks((20, 2))
    with pytest.raises(ValueError, match=message):
        QKV.stack().blocks((4, 20, 2))
    with pytest.raises(ValueError, match=r"20 rows are not a multiple of the 18 rows of the in_proj layout"):
        GATES.rows_by_rule(torch.zeros(20, 2), SCALAR)


def test_impossible_sections_are_refused() -> None:
    with pytest.raises(ValueError, match=r"section 'q': 0 rows in matrices of 0 rows"):
        Section("q", 0)
    with pytest.raises(ValueError, match=r"section 'q': 8 rows in matrices of 3 rows"):
        Section("q", 8, matrix_rows=3)
    with pytest.raises(ValueError, match=r"section 'q': rule 'adam', choose orthogonalize or scalar"):
        Section("q", 8, rule="adam")
    two_rules = MatrixLayout("in_proj", (Section("q", 4), Section("k", 4), Section("q", 4, SCALAR)))
    with pytest.raises(ValueError, match=r"sections of the name 'q' must have one rule and matrix_rows"):
        split(two_rules, torch.zeros(12, 2))


def test_layout_of_a_weight() -> None:
    param = torch.nn.Parameter(torch.zeros(36, 5))
    assert layout_of(param) is WHOLE
    param.matrix_layout = QKV
    assert layout_of(param) is QKV
