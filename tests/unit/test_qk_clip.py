"""QK-clip's pure parts: factors, rows of slices, maxima of scores."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from megatron_muon.choices import QK_CLIP_RULES
from megatron_muon.context_parallel import balanced_positions
from megatron_muon.qk_clip.clip import Target, scale_rows
from megatron_muon.qk_clip.factors import Heads, factor_table, gammas
from megatron_muon.qk_clip.measure import (
    Gauge,
    attach,
    hidden_keys,
    key_maxima,
    log_sum_exp,
    record,
    score_maxima,
    source_of,
)
from megatron_muon.qk_clip.rows import Rows


def table(
    maxima: list[float], sizes: list[tuple[int, int]], rule: str = "q_only", alpha: float = 0.5, tau: float = 100
):
    heads = Heads.of(sizes)
    values = factor_table(torch.tensor(maxima, dtype=torch.float64), heads, tau, alpha, rule)
    count = heads.count
    return (
        values[[heads.query(h) for h in range(count)]],
        values[[heads.key(h) for h in range(count)]],
        values[[heads.rope(h) for h in range(count)]],
        values,
        heads,
    )


@pytest.mark.parametrize("maximum", [-400.0, -1e-30, 0.0, 99.9, 100.0, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("rule", QK_CLIP_RULES)
def test_factor_is_exactly_one_unless_above_the_threshold(maximum: float, rule: str) -> None:
    *_, values, _ = table([maximum] * 4, [(4, 2)], rule)
    assert torch.equal(values, torch.ones_like(values))


def test_lone_heads_share_the_factor_by_alpha() -> None:
    query, key, rope, *_ = table([400.0, 50.0], [(2, 2)], alpha=0.25)
    torch.testing.assert_close(query, torch.tensor([0.25**0.25, 1.0], dtype=torch.float64))
    torch.testing.assert_close(key, torch.tensor([0.25**0.75, 1.0], dtype=torch.float64))
    torch.testing.assert_close(rope, torch.tensor([0.25, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("rule", "logits"), [("group", (58.9, 29.3)), ("q_only", (58.9, 49.1)), ("exact", (58.9, 49.1))]
)
def test_grouped_heads(rule: str, logits: tuple[float, float]) -> None:
    maxima = torch.tensor([98.6, 49.1], dtype=torch.float64)
    query, key, *_ = table(maxima.tolist(), [(2, 1)], rule, tau=58.9)
    torch.testing.assert_close(query * key * maxima, torch.tensor(logits, dtype=torch.float64), atol=0.05, rtol=0)
    assert (key == 1).all() == (rule == "q_only")
    assert (query[1] > 1).item() == (rule == "exact")
    assert (query[1] == 1).item() == (rule == "q_only")


@pytest.mark.parametrize("rule", QK_CLIP_RULES)
@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_heads_of_several_layers_do_not_mix(rule: str, alpha: float) -> None:
    together = table([400.0, 20.0, 150.0, 1.0, 300.0, 7.0], [(2, 1), (2, 2), (2, 1)], rule, alpha)
    apart = [
        table([400.0, 20.0], [(2, 1)], rule, alpha),
        table([150.0, 1.0], [(2, 2)], rule, alpha),
        table([300.0, 7.0], [(2, 1)], rule, alpha),
    ]
    for part in range(3):
        assert torch.equal(together[part], torch.cat([each[part] for each in apart]))
    heads, values = together[-1], together[-2]
    least = torch.tensor([100 / 400, 100 / 150, 100 / 300], dtype=torch.float64)
    torch.testing.assert_close(values[[heads.query_gain(i) for i in range(3)]], least**alpha)
    torch.testing.assert_close(values[[heads.key_gain(i) for i in range(3)]], least ** (1 - alpha))


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match=r"loudest.*q_only, group, exact"):
        table([1.0], [(1, 1)], "loudest")


def test_gammas_of_missing_maxima() -> None:
    assert gammas(torch.tensor([-math.inf, 200.0]), 50.0).tolist() == [1.0, 0.25]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(6, 4), (6, 1), (6,)])
def test_slices_of_a_weight_are_scaled_as_the_whole(shape: tuple[int, ...], offset: float) -> None:
    param = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    factors = torch.tensor([1.0, 0.5, 1.0, 0.25, 0.75, 1.0], dtype=torch.float64)
    rows = Rows(param, torch.arange(6), offset)
    whole = param.detach().clone()
    scale_rows(Target(whole, rows), factors)
    columns = param.numel() // 6
    expected = (param.detach().view(6, columns) + offset) * factors[:, None] - offset
    torch.testing.assert_close(whole.view(6, columns), expected)
    for start in range(param.numel()):
        for stop in range(start, param.numel() + 1):
            part = param.detach().flatten()[start:stop].clone()
            scale_rows(Target(part, rows, start), factors)
            assert torch.equal(part, whole.flatten()[start:stop]), (start, stop)


def test_a_factor_of_one_changes_no_bit() -> None:
    values = torch.tensor([[0.1, -0.0, 1e-40, 1e38], [3.0, -7.7, 1e-8, 0.3]])
    for offset in (0.0, 1.0):
        tensor = values.clone()
        rows = Rows(torch.nn.Parameter(values.clone()), torch.zeros(2, dtype=torch.int64), offset)
        scale_rows(Target(tensor, rows), torch.ones(2))
        expected = values + 0.0 if offset else values  # where 1 is added and taken away, -0 becomes 0
        assert torch.equal(tensor.view(torch.int32), expected.view(torch.int32))


def reference_maxima(query: torch.Tensor, key: torch.Tensor, scale: float, hidden: torch.Tensor | None) -> torch.Tensor:
    share = query.size(2) // key.size(2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key.repeat_interleave(share, dim=2)) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.amax(dim=(0, 2, 3))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, (-1, -1), (3, 0), (2, 1)])
def test_maxima_from_queries_and_keys(groups: int, window: tuple[int, int] | None, monkeypatch) -> None:
    monkeypatch.setattr("megatron_muon.qk_clip.measure._CHUNK", 70)  # chunks of one query, and of one head
    query = torch.randn(9, 2, 4, 8, dtype=torch.float64)
    key = torch.randn(9, 2, groups, 8, dtype=torch.float64)
    positions = torch.arange(9)
    behind = positions[:, None] - positions
    left, right = window or (-1, -1)
    outside = (behind > left if left >= 0 else behind > 99) | (behind < -right if right >= 0 else behind < -99)
    causal, full = key_maxima(query, key, 0.3, window=window), key_maxima(query, key, 0.3, window=window, causal=False)
    torch.testing.assert_close(causal, reference_maxima(query, key, 0.3, (behind < 0) | outside))
    torch.testing.assert_close(full, reference_maxima(query, key, 0.3, outside))


def test_maxima_with_a_mask_of_padding(monkeypatch) -> None:
    monkeypatch.setattr("megatron_muon.qk_clip.measure._CHUNK", 70)
    query, key = torch.randn(6, 2, 4, 8, dtype=torch.float64), torch.randn(6, 2, 4, 8, dtype=torch.float64)
    hidden = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    hidden[1, :, :, 4:] = True
    expected = reference_maxima(query, key, 1.0, hidden)
    torch.testing.assert_close(key_maxima(query, key, 1.0, hidden=hidden, causal=False), expected)


def test_hidden_scores_do_not_count() -> None:
    scores = torch.full((1, 2, 3, 3), -5.0)
    scores[0, 0, 0, 2] = 99.0
    hidden = hidden_keys(torch.arange(3), torch.arange(3))
    assert score_maxima(scores, hidden).tolist() == [-5.0, -5.0]
    assert score_maxima(scores, None).tolist() == [99.0, -5.0]
    assert score_maxima(scores, torch.ones(3, 3, dtype=torch.bool)).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_log_sum_exp_is_an_upper_bound(size: float) -> None:
    query, key = torch.randn(32, 2, 4, 16) * size, torch.randn(32, 2, 2, 16)
    exact = key_maxima(query, key, 0.25)
    bound = log_sum_exp(query, key, 0.25)
    assert (bound >= exact - 1e-4).all()
    assert (bound <= exact + math.log(32) + 1e-4).all()


def test_log_sum_exp_refuses_other_masks() -> None:
    from megatron_muon.errors import ConfigError

    query = torch.randn(4, 1, 2, 8)
    with pytest.raises(ConfigError, match=r"--muon-qk-logits lse.*use --muon-qk-logits exact"):
        log_sum_exp(query, query, 1.0, window=(2, 0))


def test_balanced_positions_cover_the_sequence() -> None:
    found = [balanced_positions(4, rank, 2, torch.device("cpu")).tolist() for rank in range(2)]
    assert found == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_gauge_keeps_the_largest() -> None:
    core = torch.nn.Identity()
    record(core, torch.tensor([1.0]))  # not measured: nothing happens
    gauge = Gauge("layer", torch.full((2,), -math.inf))
    attach(core, gauge)
    record(core, torch.tensor([1.0, -3.0]))
    record(core, torch.tensor([0.5, -2.0]))
    core.eval()
    record(core, torch.tensor([9.0, 9.0]))
    core.train()
    gauge.active = False
    record(core, torch.tensor([9.0, 9.0]))
    assert gauge.maxima.tolist() == [1.0, -2.0]
    gauge.active = True
    with pytest.raises(ValueError, match="layer: 3 maxima of attention logits for 2 heads"):
        record(core, torch.zeros(3))


@pytest.mark.parametrize("wanted", ["auto", "scores", "te"])
def test_sources_that_a_core_attention_lacks(wanted: str) -> None:
    from megatron_muon.errors import ConfigError

    with pytest.raises(ConfigError, match=r"Identity.*exact|Identity.*use auto|Identity.*Use auto"):
        source_of(torch.nn.Identity(), wanted, "decoder.layers.0.self_attention")
    assert source_of(torch.nn.Identity(), "own", "a layer") == "own"


class Context:
    """The second of two context-parallel ranks."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


def test_heads_that_context_parallelism_divides() -> None:
    """All-to-all gives each rank all tokens of its part of the heads."""
    gauge = Gauge("layer", torch.full((4,), -math.inf), Context())  # type: ignore[arg-type]
    gauge.take(torch.tensor([5.0, 6.0]))
    assert gauge.maxima.tolist() == [-math.inf, -math.inf, 5.0, 6.0]
    gauge.take(torch.tensor([7.0, 1.0, 2.0, 9.0]))
    assert gauge.maxima.tolist() == [7.0, 1.0, 5.0, 9.0]


class KernelsWithMaxima(torch.nn.Module):
    """Leaves maxima as TransformerEngine's attention in Megatron-Core does; its kernels need a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.current_max_attn_logits: torch.Tensor | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.current_max_attn_logits = values
        return values


def test_maxima_of_transformer_engine_are_taken_away() -> None:
    core = KernelsWithMaxima()
    gauge = Gauge("layer", torch.full((2,), -math.inf), source=source_of(core, "auto", "layer"))
    assert gauge.source == "te"
    second = Gauge("layer", torch.full((2,), -math.inf), source="te")
    attach(core, gauge)
    attach(core, second)
    core(torch.tensor([3.0, 1.0]))
    core(torch.tensor([2.0, 4.0]))
    for each in (gauge, second):  # of two optimizers
        assert each.maxima.tolist() == [3.0, 4.0] and core.current_max_attn_logits is None
    core.eval()
    core(torch.tensor([9.0, 9.0]))
    assert gauge.maxima.tolist() == [3.0, 4.0] and core.current_max_attn_logits is None
    core.train()
    twin = copy.deepcopy(core)  # a reference model: its logits are none of the optimizers'
    twin(torch.tensor([9.0, 9.0]))
    assert gauge.maxima.tolist() == [3.0, 4.0]
    del second, each
    core(torch.tensor([5.0, 4.0]))
    assert gauge.maxima.tolist() == [5.0, 4.0] and len(core._forward_hooks) == 1
