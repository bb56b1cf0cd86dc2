"""Split and merge of fused weights."""

import pytest
import torch

from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section

QKV = MatrixLayout("qkv", (Section("q", 6), Section("gate", 6), Section("k", 3), Section("v", 3)))


@pytest.mark.parametrize("layout", [WHOLE, QKV])
def test_merge_undoes_split(layout: MatrixLayout) -> None:
    weight = torch.arange(36 * 5.0).view(36, 5)
    assert torch.equal(layout.merge(layout.split(weight)), weight)


def test_split_collects_the_rows_of_each_matrix_over_all_groups() -> None:
    rows = torch.arange(36.0).view(36, 1)
    q, gate, k, v = (part.flatten().tolist() for part in QKV.split(rows))
    assert q == [*range(0, 6), *range(18, 24)]
    assert gate == [*range(6, 12), *range(24, 30)]
    assert k == [12, 13, 14, 30, 31, 32]
    assert v == [15, 16, 17, 33, 34, 35]


def test_block_shapes_are_those_of_the_split() -> None:
    weight = torch.zeros(54, 7)
    assert [(m, n) for _, m, n in QKV.block_shapes(54, 7)] == [tuple(part.shape) for part in QKV.split(weight)]
    assert WHOLE.block_shapes(4, 3) == [("whole", 4, 3)]


def test_broken_periods_are_refused() -> None:
    with pytest.raises(ValueError, match="20 rows are not a multiple of the 18 rows"):
        QKV.split(torch.zeros(20, 2))


def test_shards_of_whole_groups_split_as_the_whole_does() -> None:
    weight = torch.randn(72, 4, generator=torch.Generator().manual_seed(0))
    for tp in (1, 2, 4):
        shards = [QKV.split(shard) for shard in weight.chunk(tp)]
        for block, pieces in zip(QKV.split(weight), zip(*shards, strict=True), strict=True):
            assert torch.equal(torch.cat(pieces), block)
