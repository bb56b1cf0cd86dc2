"""The harness's models have weights as TransformerEngine's; ranks that are not there leave a process as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.fused_modules import GDN, MAMBA, MLA, MOE, SIZES, gpt, weights
from tests.megatron.harness import Layout
from tests.pool import RankPool


def losses_after_fake_worlds() -> tuple[list[float], list[float]]:
    """A real run in this process before and after the fake worlds."""

    def run() -> list[float]:
        losses = harness.start(Layout()).losses(2)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        return losses

    before = run()
    weights(gpt, GDN, [{}], (8,))
    return before, run()


def test_fake_groups_leave_no_state_behind(pool: RankPool) -> None:
    before, after = pool.run(losses_after_fake_worlds, 1)[0]
    assert before == after
    assert pool.run(dist_backend, 2) == ["gloo", "gloo"]


def dist_backend() -> str:
    assert dist.get_world_size() == 2
    return str(dist.get_backend())


ATTENTION = ["self_attention." + name for name in ("linear_proj.weight", "linear_qkv.layer_norm_weight")]
ATTENTION += ["self_attention.linear_qkv.weight"]
MLP = ["mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
UP = {
    name: [f"self_attention.linear_{name}_up_proj.{kind}weight" for kind in ("layer_norm_", "")] for name in ("q", "kv")
}
LATENT = ["input_layernorm.weight", "self_attention.linear_proj.weight"]
LATENT += ["self_attention.linear_q_down_proj.weight", *UP["q"]]
LATENT += ["self_attention.linear_kv_down_proj.weight", *UP["kv"]]
FUSED = ["linear_proj.weight", "linear_qkv_down_proj.layer_norm_weight", "linear_qkv_down_proj.weight"]
FUSED = [f"self_attention.{name}" for name in FUSED] + UP["q"] + UP["kv"]
EXPERTS = ["pre_mlp_layernorm.weight", "mlp.router.weight"]
EXPERTS += [f"mlp.experts.local_experts.{i}.linear_fc{j}.weight" for i in range(4) for j in (1, 2)]
EXPERTS += [f"mlp.shared_experts.{name}weight" for name in ("gate_", "linear_fc1.", "linear_fc2.")]
DELTA = [f"self_attention.{name}" for name in ("dt_bias", "A_log", "in_proj.layer_norm_weight", "in_proj.weight")]
DELTA += [f"self_attention.{name}.weight" for name in ("conv1d", "out_norm", "out_proj")]
MIXER = ["mixer." + name for name in ("conv1d_weight", "conv1d_bias", "dt_bias", "A_log", "D")]
MIXER += [f"mixer.{name}" for name in ("in_proj.layer_norm_weight", "in_proj.weight", "norm.weight", "out_proj.weight")]


def order(layout: Layout, model: dict[str, Any], layer: int) -> list[str]:
    """Names of the weights of a layer, in the order in which DDP sees them."""
    layout.initialize()
    names = [name for name, _ in gpt(layout, **SIZES | model).named_parameters()]
    return [name.removeprefix(f"decoder.layers.{layer}.") for name in names if f".layers.{layer}." in name]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param({}, ATTENTION + MLP, id="dense"),
        pytest.param(MOE, ATTENTION + EXPERTS, id="experts"),
        pytest.param(MLA, LATENT + MLP, id="latent attention"),
        pytest.param({**MLA, "mla_down_proj_fusion": True}, FUSED + MLP, id="latent attention, fused"),
        pytest.param(GDN, DELTA + MLP, id="gated delta net"),
        pytest.param(MAMBA, MIXER, id="mamba"),
    ],
)
def test_weights_come_in_the_order_of_transformer_engine(
    pool: RankPool, model: dict[str, Any], expected: list[str]
) -> None:
    assert pool.run(order, 1, Layout(), model, 0)[0] == expected
