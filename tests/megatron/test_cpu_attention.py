"""The core attention, norms and GatedDeltaNet functions of megatron_muon.cpu against straightforward references."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_muon import cpu
from megatron_muon.cpu.attention import attention_scores, weighted_values
from megatron_muon.cpu.gated_delta_net import causal_conv1d, l2norm
from megatron_muon.cpu.norms import build_norm
from tests.pool import RankPool


def reference_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention by torch, for [s, b, heads, d]."""
    heads = query.size(2)
    q, k, v = (x.repeat_interleave(heads // x.size(2), dim=2).permute(1, 2, 0, 3).double() for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("v_channels", [8, 6])
def test_scores_and_values(groups: int, v_channels: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(5, 2, 4, 8, dtype=torch.float64)
    key = torch.randn(5, 2, groups, 8, dtype=torch.float64)
    value = torch.randn(5, 2, groups, v_channels, dtype=torch.float64)
    scores = attention_scores(query, key, 1 / math.sqrt(8))
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    out = weighted_values(scores.masked_fill(mask, -torch.inf).softmax(-1), value)
    torch.testing.assert_close(out, reference_attention(query, key, value), rtol=1e-12, atol=1e-12)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"num_query_groups": 2},
    "layer_scaling": {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
    "window": {"window_size": (3, 0)},
    "off_by_one": {"softmax_type": "off-by-one"},
    "learnable_offset": {"softmax_type": "learnable"},
    "bf16": {"bf16": True, "params_dtype": torch.bfloat16, "attention_softmax_in_fp32": True},
    "dropout": {"attention_dropout": 0.3},
}


def both_attentions(options: dict[str, Any]) -> None:
    """Upstream's forward pass and ours, on one module: equal outputs and gradients, bit for bit."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, **({"attention_dropout": 0.0} | options)
    )
    ours = DotProductAttention.forward
    cpu.uninstall()
    upstream = DotProductAttention.forward
    cpu.install()
    assert upstream is not ours
    module = DotProductAttention(config, 2, AttnMaskType.causal, "self")
    torch.manual_seed(0)
    groups = config.num_query_groups
    shapes = ((8, 2, 4, 8), (8, 2, groups, 8), (8, 2, groups, 8))
    inputs = [torch.randn(shape, dtype=config.params_dtype, requires_grad=True) for shape in shapes]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    results = []
    for forward in (upstream, ours):
        model_parallel_cuda_manual_seed(7)
        out = forward(module, *inputs, mask)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for theirs, mine in zip(*results, strict=True):
        assert torch.equal(theirs, mine)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_upstream_where_both_work(pool: RankPool, variant: str) -> None:
    pool.run(both_attentions, 1, VARIANTS[variant])


def latent_attention() -> None:
    """Keys of 12 channels and values of 6, as multi-latent attention makes them."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    module = DotProductAttention(config, 1, AttnMaskType.causal, "self", k_channels=12, v_channels=6)
    query, key, value = torch.randn(5, 2, 4, 12), torch.randn(5, 2, 4, 12), torch.randn(5, 2, 4, 6)
    out = module(query, key, value, None)
    assert out.shape == (5, 2, 24) and module.hidden_size_per_partition == 24
    torch.testing.assert_close(out.double(), reference_attention(query, key, value), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="packing"):
        module(query, key, value, None, packed_seq_params=object())


def test_latent_attention(pool: RankPool) -> None:
    pool.run(latent_attention, 1)


def norm_config(**changes: Any) -> SimpleNamespace:
    values = {"normalization": "RMSNorm", "layernorm_zero_centered_gamma": False, "sequence_parallel": False}
    return SimpleNamespace(**(values | changes))


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms(normalization: str, zero_centered: bool) -> None:
    config = norm_config(
        normalization=normalization, layernorm_zero_centered_gamma=zero_centered, sequence_parallel=True
    )
    norm = build_norm(config, 16, eps=1e-6)
    assert all(parameter.sequence_parallel for parameter in norm.parameters())
    x = torch.randn(3, 16)
    centered = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)
    assert float(norm.weight.detach().mean()) == (0.0 if zero_centered else 1.0)


def test_unknown_norm() -> None:
    with pytest.raises(ValueError, match="BatchNorm"):
        build_norm(norm_config(normalization="BatchNorm"), 4)


def test_causal_convolution() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 3), torch.randn(3, 4), torch.randn(3)
    out, state = causal_conv1d(x, weight, bias, activation="silu")
    padded = torch.cat([torch.zeros(2, 3, 3), x], dim=1)
    expected = sum(padded[:, i : i + 7] * weight[:, i] for i in range(4)) + bias
    torch.testing.assert_close(out, torch.nn.functional.silu(expected))
    assert state is None
    with pytest.raises(NotImplementedError, match="packing"):
        causal_conv1d(x, weight, cu_seqlens=torch.tensor([0, 7]))


def test_l2norm() -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    expected = x.float() / (x.float().square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert l2norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(l2norm(x), expected.bfloat16())
