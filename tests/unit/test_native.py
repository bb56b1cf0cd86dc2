"""A hook that replaces a class, in the form that the extension point of the class's constructor takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pool import RankPool

CHOICES = [("auto", True), ("auto", False), ("te", True), ("exact", True), ("lse", True)]
"""``--qk-logits``, and whether TransformerEngine is there to be asked."""


def asked_for_maxima(dtype: torch.dtype) -> list[list[tuple[bool, bool]]]:
    """The flags in the config that Megatron's attention is built with: by the hook, and at the extension point.

    Megatron's own attention stands for TransformerEngine's, which needs a GPU: both take the config first.
    """
    import megatron.core.utils
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_muon import MuonConfig, plugin
    from megatron_muon.plugin import options
    from tests.megatron.harness import Layout

    Layout().initialize()
    target = "megatron.core.extensions.transformer_engine:TEDotProductAttention"
    [hook] = [patch for patch in plugin._PATCHES.patches if patch.target == target]
    assert hook.make_at_point is not None and hook.point == f"{target}.__init__"

    class AtPoint(DotProductAttention):
        __init__ = hook.make_at_point(DotProductAttention.__init__)

    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    config = TransformerConfig(**sizes, params_dtype=dtype, bf16=dtype == torch.bfloat16)
    config.qk_clip = config.log_max_attention_logit = True
    found = []
    try:
        for choice, can in CHOICES:
            options.take_installed(MuonConfig(qk_logits=choice))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(megatron.core.utils, "is_te_min_version", lambda version, can=can: can)
                built: list[Any] = [
                    kind(config, 3, AttnMaskType.causal, "self", softmax_scale=0.5)
                    for kind in (hook.make(DotProductAttention), AtPoint)
                ]
            assert all((each.layer_number, each.softmax_scale) == (3, 0.5) for each in built)
            found.append([(each.config.qk_clip, each.config.log_max_attention_logit) for each in built])
    finally:
        options.forget()
    assert config.qk_clip and config.log_max_attention_logit, "the model's own config"
    return found


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, [True, False, True, False, False]), (torch.float32, [False] * 5)],
)
def test_attention_is_asked_for_maxima_as_by_the_hook(pool: RankPool, dtype: torch.dtype, expected: list[bool]) -> None:
    """Where they are to come from TransformerEngine, and can: it has them in 16 bits."""
    assert pool.run(asked_for_maxima, 1, dtype)[0] == [[(asked, asked)] * 2 for asked in expected]
