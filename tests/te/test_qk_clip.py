"""Where QK-clip gets logits from when TransformerEngine is there: built, for its kernels need a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_muon.qk_clip.measure import Gauge
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.te import models, needs_transformer_engine

pytestmark = needs_transformer_engine


def sources(source: str, bf16: bool, mla: bool) -> tuple[set[str], set[bool], list[str]]:
    """Sources of all layers, whether TransformerEngine is asked for maxima, and the names of clipped weights."""
    import megatron_muon
    from megatron_muon.plugin.groups import ranks_of
    from megatron_muon.plugin.qk_clip_build import build_clip
    from megatron_muon.qk_clip.measure import _GAUGES, source_of
    from tests.megatron.qk_clip import plain_optimizer

    layout = Layout(tp=2)
    layout.initialize()
    options = megatron_muon.MuonConfig(qk_logits=source)
    megatron_muon.install(options)
    changes = {**(models.MODELS["mla"] if mla else {}), "qk_clip": True, "qk_layernorm": False, "bf16": bf16}
    models.MODELS["clipped"] = changes
    model = models.build_model(layout, "clipped")
    optimizer = plain_optimizer(model, layout)
    clip = build_clip(optimizer.config, [model], options, optimizer, ranks_of(None))
    cores = [module for module in model.modules() if module in _GAUGES]
    found = {source_of(core, source, "layer") for core in cores}
    names = {param: name for name, param in model.named_parameters()}
    return found, {core.return_max_logit for core in cores}, [names[rows.param] for rows in clip.rows]


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize(
    ("source", "bf16", "expected", "asked"),
    [
        ("auto", True, "te", True),
        ("auto", False, "exact", False),
        ("te", True, "te", True),
        ("lse", True, "lse", False),
    ],
)
def test_sources(pool: RankPool, source: str, bf16: bool, expected: str, asked: bool, mla: bool) -> None:
    found, returned, names = pool.run(sources, 2, source, bf16, mla)[0]
    assert found == {expected} and returned == {asked}
    kinds = {name.partition("self_attention.")[2] for name in names}
    weights = {"linear_q_up_proj.weight", "linear_kv_up_proj.weight"} if mla else {"linear_qkv.weight"}
    assert kinds == weights


def refusal() -> str:
    from megatron_muon.errors import ConfigError

    try:
        sources("te", False, False)
    except ConfigError as error:
        return str(error)
    return ""


def test_float32_has_no_maxima(pool: RankPool) -> None:
    assert "TransformerEngine 2.9 or later and bfloat16 or float16. Use auto or exact." in pool.run(refusal, 2)[0]


def divided_heads() -> tuple[list[float], list[float], list[float]]:
    """Of each rank, by TransformerEngine's own messages: the heads that it attends to, and all their maxima."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    group, ranks, heads = dist.group.WORLD, dist.get_world_size(), 8
    numbers = torch.arange(float(heads))
    q, k, v = (numbers.view(1, 1, heads, 1).expand(4, 2, heads, 2).contiguous() for _ in range(3))
    order = context_parallel.get_seq_chunk_ids_for_reordering_before_attn(ranks, q.device)
    stream = torch.cuda.current_stream()
    inputs = context_parallel.flash_attn_a2a_communicate(
        [q, k, v], order, 0, ranks, group, stream, True, qkv_format="sbhd", a2a_input_names=["q", "k", "v"]
    )
    mine = inputs[0].amax(dim=(0, 1, 3))
    whole = context_parallel.flash_attn_a2a_communicate_softmax_offset(mine, 0, ranks, group, stream, False)
    gauges = [Gauge("layer", torch.full((heads,), -torch.inf), group) for _ in range(2)]
    for gauge, values in zip(gauges, (whole, mine), strict=True):  # all maxima, and those of its heads alone
        gauge.take(values)
    dist.all_reduce(gauges[1].maxima, dist.ReduceOp.MAX)
    return numbers.tolist(), *(gauge.maxima.tolist() for gauge in gauges)


def test_heads_that_all_to_all_divides_keep_their_numbers(pool: RankPool) -> None:
    """With ``cp_comm_type`` a2a each rank has all tokens of some heads: its maxima must be those of these heads."""
    for expected, whole, reduced in pool.run(divided_heads, 2):
        assert expected == whole == reduced
