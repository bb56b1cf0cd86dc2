"""The CPU runtime where TransformerEngine can be imported: what it lets through and what it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_muon import cpu
from megatron_muon.cpu.optimizers import GroupStepAdamW
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.te import needs_transformer_engine

pytestmark = needs_transformer_engine


def build_with_and_without() -> tuple[str, bool, bool, str]:
    """TransformerEngine's linear layer with the redirects, and its refusal without them."""
    import transformer_engine.pytorch as te

    before = torch.cuda.is_available()
    weight = te.Linear(4, 6).weight
    after = torch.cuda.is_available()
    cpu.uninstall()
    try:
        te.Linear(4, 6)
    except RuntimeError as error:
        message = str(error)
    finally:
        cpu.install()
    return f"{weight.device} {tuple(weight.shape)}", before, after, message


def test_modules_are_built_and_nothing_else_believes_in_a_gpu(pool: RankPool) -> None:
    weight, before, after, message = pool.run(build_with_and_without, 1)[0]
    assert weight == "cpu (6, 4)"
    assert (before, after) == (False, False)
    assert "needs CUDA" in message


def adam_of(layout: Layout) -> tuple[bool, list[type], list[float]]:
    """Train with Adam: whether Megatron has TransformerEngine, the optimizers' classes, losses."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    run = harness.start(layout, optimizer={"name": "adam"})
    parts: list[Any] = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    return HAVE_TE, [type(part.optimizer) for part in parts], run.losses(4)


def test_adam_is_not_the_fused_one(pool: RankPool) -> None:
    """With the distributed optimizer too, and with gradient clipping, whose kernels are TransformerEngine's else.

    The two add up the squares of gradients in another order, over weights and over slices of a buffer: norms, and so
    clipped gradients, differ by a few roundings. Adam's update is the same for gradients that are all scaled alike, so
    weights differ by roundings of an update, and a loss by roundings of its own: two micro-batches, each in float32.
    """
    results = [pool.run(adam_of, 2, Layout(ddp_buffers=buffers))[0] for buffers in (False, True)]
    for have_te, classes, losses in results:
        assert have_te
        assert set(classes) == {GroupStepAdamW}
        assert losses == pytest.approx(results[0][2], rel=4 * torch.finfo(torch.float32).eps)
        assert losses[-1] < losses[0]


def hybrid_layers() -> tuple[str, str]:
    """Megatron-Core's specification of a hybrid, with no backend named and with TransformerEngine's."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_gated_delta_net_module_spec

    from tests.te.models import GDN

    config = harness.transformer_config(Layout(), **GDN)
    specs = get_gated_delta_net_module_spec(config), get_gated_delta_net_module_spec(config, TESpecProvider())
    return tuple(spec.submodules.in_proj.__name__ for spec in specs)


def test_hybrids_stay_trainable_unless_transformer_engine_is_named(pool: RankPool) -> None:
    assert pool.run(hybrid_layers, 1)[0] == ("ColumnParallelLinear", "TELayerNormColumnParallelLinear")
