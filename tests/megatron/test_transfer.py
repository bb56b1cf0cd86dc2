"""``--muon-transfer`` on real models: what every weight's group gets, initial weights, branches, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.errors import ConfigError
from megatron_muon.transfer import Role
from tests.megatron import harness
from tests.megatron.fused_modules import multi_token_prediction
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN
from tests.pool import RankPool

LR, DECAY, EPS = 0.01, 0.1, 1e-8
RULE = {"muon_scale_mode": "unit_rms_norm", "muon_weight_decay_method": "independent_scheduled"}
# The harness's model has hidden size 32 and 4 layers.
WIDER_AND_DEEPER = {**RULE, "muon_transfer": "8x2", "lr": LR, "min_lr": LR / 10}
WIDTH, DEPTH = 4.0, 2.0
# The norm of all gradients differs: those of last projections are L times as large without a multiplier.
NO_CLIPPING = {"clip_grad": 0.0}

Group = dict[str, float | None]


def groups(optimizer: dict[str, Any], model: dict[str, Any], layout: Layout = Layout()) -> dict[str, Group]:  # noqa: B008
    """The numbers of each weight's group."""
    from megatron_muon.routing.annotate import global_names

    run = harness.start(layout, optimizer=optimizer, **model)
    names = {param: name for chunk in run.chunks for name, param in global_names(chunk)}
    keys = ("max_lr", "min_lr", "start_wd", "weight_decay", "eps", "damping_depth", "scalar_lr_mult", "scalar_wd_mult")
    return {
        names[param]: {key: group.get(key) for key in keys}
        for group in run.optimizer.param_groups
        for param in group["params"]
    }


def check(found: dict[str, Group], name: str, rate: float, eps: float | None, depth: float | None) -> None:
    """One weight: factors on learning rate and Adam's eps, and Muon's depth. Weight decay follows from the rate."""
    group = next(group for full, group in found.items() if full.endswith(name))
    assert group["max_lr"] == pytest.approx(LR * rate), name
    assert group["min_lr"] == pytest.approx(LR / 10 * rate), name
    assert group["damping_depth"] == depth, name
    if eps is None:
        assert group["weight_decay"] == pytest.approx(DECAY / WIDTH), name
    else:
        assert group["eps"] == pytest.approx(EPS * eps), name
        # AdamW shrinks by rate x this: the same share of every weight, whatever its rate.
        assert group["weight_decay"] * group["max_lr"] == pytest.approx(DECAY / WIDTH), name
    assert group["start_wd"] == group["weight_decay"], name


def test_groups_of_a_gpt(pool: RankPool) -> None:
    found = pool.run(groups, 1, WIDER_AND_DEEPER, {"qk_layernorm": True, "add_bias_linear": True})[0]
    layer = "layers.1"
    check(found, f"{layer}.self_attention.linear_qkv.weight", 1.0, None, DEPTH)
    check(found, f"{layer}.mlp.linear_fc1.weight", 1.0, None, DEPTH)
    check(found, f"{layer}.self_attention.linear_proj.weight", 1 / DEPTH, None, 1.0)
    check(found, f"{layer}.mlp.linear_fc2.weight", 1 / DEPTH, None, 1.0)
    check(found, f"{layer}.mlp.linear_fc2.bias", 1 / DEPTH, 1 / WIDTH, None)
    check(found, f"{layer}.mlp.linear_fc1.bias", 1.0, 1 / WIDTH / DEPTH, None)
    check(found, f"{layer}.self_attention.q_layernorm.weight", 1.0, 1 / WIDTH / DEPTH, None)
    check(found, "embedding.word_embeddings.weight", 1.0, 1 / WIDTH, None)
    check(found, "final_layernorm.weight", 1.0, 1 / WIDTH, None)
    check(found, "output_layer.weight", 1 / WIDTH, 1.0, None)


def test_groups_of_other_layers(pool: RankPool) -> None:
    """Experts, a GatedDeltaNet in_proj that is Adam's, and one whose gates' rows are."""
    found = pool.run(groups, 1, WIDER_AND_DEEPER, {"num_moe_experts": 2})[0]
    check(found, "mlp.experts.local_experts.1.linear_fc1.weight", 1.0, None, DEPTH)
    check(found, "mlp.experts.local_experts.1.linear_fc2.weight", 1 / DEPTH, None, 1.0)
    check(found, "mlp.router.weight", 1.0, None, DEPTH)
    found = pool.run(groups, 1, WIDER_AND_DEEPER, GDN)[0]
    check(found, "self_attention.in_proj.weight", 1 / WIDTH, 1 / WIDTH / DEPTH, None)
    check(found, "self_attention.out_proj.weight", 1 / DEPTH, None, 1.0)
    check(found, "self_attention.conv1d.weight", 1.0, 1 / WIDTH / DEPTH, None)
    found = pool.run(groups, 1, {**WIDER_AND_DEEPER, "muon_gdn_in_proj": "split"}, GDN)[0]
    check(found, "self_attention.in_proj.weight", 1.0, None, DEPTH)
    rows = next(group for name, group in found.items() if name.endswith("in_proj.weight"))
    assert rows["scalar_lr_mult"] == pytest.approx(1 / WIDTH)
    assert rows["scalar_lr_mult"] * LR * rows["weight_decay"] * rows["scalar_wd_mult"] == pytest.approx(DECAY / WIDTH)


def roles_of_multi_token_prediction() -> dict[str, Role]:
    from megatron_muon.routing.annotate import annotate, global_names
    from megatron_muon.transfer import roles

    Layout().initialize()
    model = multi_token_prediction(Layout())
    annotate(model)
    named = list(global_names(model))
    found = roles(model, named)
    return {name: found[param] for name, param in named if name.startswith("mtp.") or ".1." in name}


def test_multi_token_prediction_is_no_deeper_in_a_deeper_model(pool: RankPool) -> None:
    """It starts a stream of its own, of one layer."""
    found = pool.run(roles_of_multi_token_prediction, 1)[0]
    mtp = {name: role for name, role in found.items() if name.startswith("mtp.")}
    assert any(name.endswith("eh_proj.weight") for name in mtp) and any(
        name.endswith("linear_fc2.weight") for name in mtp
    )
    assert not any(role.in_layer or role.ends_branch for role in mtp.values())
    decoder = found["decoder.layers.1.mlp.linear_fc2.weight"]
    assert decoder.in_layer and decoder.ends_branch


def test_static_decay_and_a_rate_of_adams_own(pool: RankPool) -> None:
    """Without transfer; and a base of Adam's rates with it."""
    options = {
        "lr": LR,
        "min_lr": LR,
        "muon_scalar_lr": 0.002,
        "muon_scalar_weight_decay_method": "independent_scheduled",
    }
    found = pool.run(groups, 1, options, {})[0]
    for name, group in found.items():
        if group["eps"] is not None:
            assert group["max_lr"] == pytest.approx(0.002), name
            assert group["max_lr"] * group["weight_decay"] == pytest.approx(DECAY), name
        else:
            assert (group["max_lr"], group["weight_decay"]) == (LR, DECAY), name
    found = pool.run(groups, 1, {**WIDER_AND_DEEPER, "muon_scalar_lr": 0.002}, {})[0]
    assert found["output_layer.weight"]["max_lr"] == pytest.approx(0.002 / WIDTH)
    assert found["decoder.layers.0.mlp.linear_fc1.weight"]["max_lr"] == LR


def deviations(base: str, layout: Layout) -> dict[str, float]:
    """RMS of initial weights, without the optimizer."""
    layout.initialize()
    chunks = harness.build_model(layout, transfer=base, hidden_size=256, ffn_hidden_size=512, num_attention_heads=16)
    return {name: param.square().mean().sqrt().item() for name, param in chunks[0].named_parameters()}


def test_initial_weights(pool: RankPool) -> None:
    """Against the standard deviations of the base, whose own are those of Megatron-Core without the flag."""
    same, base = (pool.run(installed, 1, name)[0] for name in ("256x4", ""))
    found = pool.run(installed, 1, "64x1")[0]
    ratios = {
        "embedding.word_embeddings.weight": 1.0,
        "decoder.layers.0.self_attention.linear_qkv.weight": 1 / 2,
        "decoder.layers.3.mlp.linear_fc1.weight": 1 / 2,
        "output_layer.weight": 1 / 4,
    }
    for name, ratio in ratios.items():
        # Zeros take no random numbers, so that other weights are drawn than without the flag.
        assert same[name] == pytest.approx(base[name], rel=0.02), name
        assert found[name] / same[name] == pytest.approx(ratio, rel=1e-5), name
    for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
        assert found[f"decoder.layers.2.{name}"] == same[f"decoder.layers.2.{name}"] == 0.0


def installed(base: str) -> dict[str, float]:
    import megatron_muon

    megatron_muon.install()
    return deviations(base, Layout())


def with_multipliers(weights: str, steps: int) -> list[float]:
    """Training by forward multipliers 1 / L, as the paper has it."""
    run = harness.start(
        Layout(),
        weights=weights,
        optimizer={**RULE, "muon_scalar_weight_decay_method": "independent_scheduled", **NO_CLIPPING},
    )
    for name, module in harness.unwrap(run.chunks[0]).named_modules():
        if name.endswith(("linear_proj", "linear_fc2")):
            module.register_forward_hook(lambda module, args, output: (output[0] / DEPTH, output[1]))
    return run.losses(steps)


def by_transfer(weights: str, steps: int) -> list[float]:
    """The same model by ``--muon-transfer``: the projections themselves learn at 1 / L."""
    return harness.start(Layout(), weights=weights, optimizer={**RULE, "muon_transfer": "32x2", **NO_CLIPPING}).losses(
        steps
    )


def test_branches_are_those_of_a_forward_multiplier(pool: RankPool, tmp_path: Path) -> None:
    """A checkpoint of such a run needs no multiplier to be used. Differences are those of eps alone."""
    folder = str(tmp_path / "initial")
    pool.run(harness.save_initial_weights, 1, folder, transfer="32x2")
    expected = pool.run(with_multipliers, 1, folder, 6)[0]
    found = pool.run(by_transfer, 1, folder, 6)[0]
    assert found == pytest.approx(expected, abs=2e-5)
    assert expected[-1] < expected[0] - 0.1


def numbers(run: Any) -> dict[str, Group]:
    """What tells the groups of a run's weights apart, by the weights' names."""
    from megatron_muon.plugin.optimizer_state import param_states
    from megatron_muon.routing.annotate import global_names

    names = {param: name for chunk in run.chunks for name, param in global_names(chunk)}
    keys = ("eps", "damping_depth", "max_lr", "start_wd", "wd_mult", "scalar_lr_mult", "scalar_wd_mult")
    return {names[held.param]: {key: held.group.get(key) for key in keys} for held in param_states(run.optimizer)}


def save(layout: Layout, folder: str) -> list[float]:
    run = harness.start(layout, optimizer=WIDER_AND_DEEPER, early=True)
    run.losses(2)
    harness.save_run(run, folder)
    return run.losses(2)


def resume(layout: Layout, folder: str) -> tuple[dict[str, Group], dict[str, Group], list[float]]:
    run = harness.start(layout, optimizer=WIDER_AND_DEEPER, early=True)
    before = numbers(run)
    harness.load_run(run, folder)
    return before, numbers(run), run.losses(2)


@pytest.mark.parametrize(
    "layout", [pytest.param(Layout(), marks=pytest.mark.slow), Layout(layer_wise=True)], ids=["plain", "layer_wise"]
)
def test_groups_keep_their_numbers_at_resume(pool: RankPool, tmp_path: Path, layout: Layout) -> None:
    """Megatron-Core tells param groups apart by rates and decay alone, and they differ in eps and depth, too."""
    ranks, folder = (2 if layout.layer_wise else 1), str(tmp_path / "saved")
    expected = pool.run(save, ranks, layout, folder)
    for (before, after, losses), going_on in zip(pool.run(resume, ranks, layout, folder), expected, strict=True):
        assert after == before and len({group["eps"] for group in after.values()}) > 2
        assert losses == going_on


def with_the_checkpoints_schedule(folder: str, optimizer: dict[str, Any]) -> dict[str, Group] | str:
    """Resumed under ``--use-checkpoint-opt_param-scheduler``."""
    from megatron_muon.plugin import options

    run = harness.start(Layout(), optimizer=optimizer, early=True)
    arguments = SimpleNamespace(use_checkpoint_opt_param_scheduler=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "training_arguments", lambda: arguments)
        try:
            harness.load_run(run, folder)
        except CheckpointError as error:
            return str(error)
    return numbers(run)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param({**RULE, "lr": 0.5, "min_lr": 0.0}, marks=pytest.mark.slow),
        {**WIDER_AND_DEEPER, "muon_transfer": "16x2", "lr": 0.5, "min_lr": 0.0},
    ],
    ids=["without", "another"],
)
def test_rates_of_the_checkpoint_belong_to_its_transfer(
    pool: RankPool, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    folder = str(tmp_path / "saved")
    pool.run(save, 1, Layout(), folder)
    found = pool.run(with_the_checkpoints_schedule, 1, folder, {**WIDER_AND_DEEPER, "lr": 0.5, "min_lr": 0.0})[0]
    assert found["decoder.layers.0.self_attention.linear_qkv.weight"]["max_lr"] == LR
    assert found["output_layer.weight"]["max_lr"] == pytest.approx(LR / WIDTH)
    # Of rows under Adam's rule, as multiples of what the group has.
    multiples = found["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert multiples["scalar_wd_mult"] * multiples["scalar_lr_mult"] * LR == pytest.approx(1.0)
    message = pool.run(with_the_checkpoints_schedule, 1, folder, optimizer)[0]
    assert isinstance(message, str) and message.startswith("--use-checkpoint-opt_param-scheduler: learning rates")
    assert "self_attention.linear_proj.weight[3]" in message


def in_torch_format() -> tuple[dict[str, Group], dict[str, Group]]:
    """Groups before and after Megatron's own state dictionary is loaded, which ``--ckpt-format torch`` keeps."""
    run = harness.start(Layout(), optimizer=WIDER_AND_DEEPER)
    run.losses(2)
    before = numbers(run)
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    return before, numbers(run)


def test_torch_format(pool: RankPool) -> None:
    before, after = pool.run(in_torch_format, 1)[0]
    assert after == before


def on_one_stage(conflict: bool) -> str:
    """A layer of the last stage whose branch has no known end; or an override of the user's for its weights."""
    from megatron.core import parallel_state
    from megatron.core.optimizer.optimizer_config import ParamKey

    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer

    layout = Layout(pp=2)
    layout.initialize()
    chunks = harness.build_model(layout, transfer="8x2")
    if parallel_state.is_pipeline_last_stage() and not conflict:
        mlp = harness.unwrap(chunks[0]).decoder.layers[1].mlp
        mlp.last = mlp.linear_fc2
        del mlp.linear_fc2
    overrides = {ParamKey(name="*final_layernorm.weight"): {"eps": 1e-6}} if conflict else None
    try:
        chunks = harness.wrap(chunks, layout)
        get_megatron_optimizer(harness.optimizer_config(layout, **WIDER_AND_DEEPER), chunks, overrides)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("conflict", "message"),
    [
        (False, "decoder.layers.3.mlp has no linear_proj, linear_fc2 or out_proj"),
        (True, "final_layernorm.weight: --muon-transfer (or"),
    ],
)
def test_what_one_stage_cannot_do_stops_all(pool: RankPool, conflict: bool, message: str) -> None:
    for found in pool.run(on_one_stage, 2, conflict):
        assert message in found


def refused(optimizer: dict[str, Any], model: dict[str, Any], scaled: bool = True) -> str:
    import megatron_muon

    megatron_muon.install()
    try:
        if scaled:
            harness.start(Layout(), optimizer=optimizer, **model)
        else:
            Layout().initialize()
            chunks = harness.wrap(harness.build_model(Layout(), **model), Layout())
            from megatron.core.optimizer import get_megatron_optimizer

            get_megatron_optimizer(harness.optimizer_config(Layout(), **optimizer), chunks)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("optimizer", "model", "message"),
    [
        (
            {},
            {"tied": True},
            "--muon-transfer without --untie-embeddings-and-output-weights: the output layer is the embedding",
        ),
        ({"decoupled_lr": 0.1}, {}, "--muon-transfer 8x2 with --decoupled-lr 0.1"),
        ({"lr": None, "min_lr": None}, {}, "--muon-weight-decay-method independent_scheduled without --lr"),
        (
            {"name": "spectral_sphere", "muon_scale_mode": "spectral", "muon_weight_decay_method": "decoupled"},
            {},
            "--muon-transfer 8x2 with --optimizer spectral_sphere",
        ),
        ({"name": "adaptive_muon"}, {}, "; add --muon-scale-mode spectral_norm"),
        ({"decoupled_weight_decay": False}, {}, "OptimizerConfig.decoupled_weight_decay False with --muon-transfer"),
        (
            {},
            {"init_method": torch.nn.init.xavier_normal_},
            "8x2 with init_method <function xavier",
        ),
    ],
)
def test_what_is_refused(pool: RankPool, optimizer: dict[str, Any], model: dict[str, Any], message: str) -> None:
    assert message in pool.run(refused, 1, {**WIDER_AND_DEEPER, **optimizer}, model)[0]


def test_a_model_that_was_not_scaled_is_refused(pool: RankPool) -> None:
    message = pool.run(refused, 1, WIDER_AND_DEEPER, {}, False)[0]
    assert "Call megatron_muon.transfer.scale_initialization(config, '8x2') before it is built" in message
