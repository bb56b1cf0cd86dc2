"""Training with QK-clip: the same at every parallel layout, and logits stay bounded where they would explode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from megatron_muon.plugin.qk_clip import clip_of
from megatron_muon.qk_clip.factors import factor_table
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.qk_clip import GQA, LATENT
from tests.megatron.test_cpu_mamba import MAMBA
from tests.pool import RankPool


class Trained(NamedTuple):
    """A run, on one rank."""

    losses: list[float]
    maxima: list[float]
    clipped: list[int]


def train(
    layout: Layout, weights: str, threshold: float, optimizer: dict[str, Any], build: dict[str, Any], steps: int = 6
) -> Trained:
    build = dict(build)
    start = {key: build.pop(key) for key in ("bf16", "param_layout") if key in build}
    flags = {"qk_clip": True, "qk_clip_threshold": threshold}
    run = harness.start(layout, weights=weights, optimizer=optimizer, **start, **flags, **build)
    clip = clip_of(run.chunks)
    losses, maxima, clipped = [], [], []
    for _ in range(steps):
        losses += run.losses(1)
        maxima.append(clip.max_logit.item())
        clipped.append(int(clip.heads_clipped))
    return Trained(losses, maxima, clipped)


MODELS: dict[str, tuple[float, dict[str, Any]]] = {
    "gqa": (0.5, {**GQA, "init_method_std": 0.2}),
    "gate": (0.5, {**GQA, "init_method_std": 0.2, "attention_output_gate": True}),
    "mla": (0.5, {**LATENT, "init_method_std": 0.2}),
    "hybrid": (0.5, {**MAMBA, "init_method_std": 0.2}),
}
MUON: dict[str, Any] = {}
ADAM = {"name": "adam"}

LAYOUTS = {
    "gqa-tp2_sp": ("gqa", 2, Layout(tp=2, sp=True), MUON, {}),
    "gqa-tp4, more ranks than query groups": ("gqa", 4, Layout(tp=4), MUON, {}),
    "gqa-pp2": ("gqa", 2, Layout(pp=2), MUON, {}),
    "gqa-pp2_vpp2": ("gqa", 2, Layout(pp=2, vpp=2), MUON, {}),
    "gqa-dp2": ("gqa", 2, Layout(), MUON, {}),
    "gqa-dp2_layer_wise": ("gqa", 2, Layout(layer_wise=True), MUON, {}),
    "gqa-cp2": ("gqa", 2, Layout(cp=2), MUON, {}),
    "gqa-cp2, products again": ("gqa", 2, Layout(cp=2), {"muon_qk_logits": "exact"}, {}),
    "gqa-adam": ("gqa", 1, Layout(), ADAM, {}),
    "gqa-adam_dp2, distributed optimizer": ("gqa", 2, Layout(ddp_buffers=True), ADAM, {}),
    "gqa-adam_tp2_dp2, distributed optimizer": ("gqa", 4, Layout(tp=2, ddp_buffers=True), ADAM, {}),
    "gqa-recomputed activations": (
        "gqa",
        1,
        Layout(),
        MUON,
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "gate-tp2": ("gate", 2, Layout(tp=2), MUON, {}),
    "gate-tp4, more ranks than query groups": ("gate", 4, Layout(tp=4), MUON, {}),
    "mla-tp2": ("mla", 2, Layout(tp=2), MUON, {}),
    "mla-dp2_layer_wise": ("mla", 2, Layout(layer_wise=True), MUON, {}),
    "hybrid-tp2": ("hybrid", 2, Layout(tp=2), MUON, {}),
}


def train_each(folder: str) -> dict[tuple[str, str], Trained]:
    """Save the initial weights of each model, and train it on this rank: with Muon, and one with Adam."""
    found = {}
    for name, (threshold, build) in MODELS.items():
        torch.manual_seed(0)
        Layout().initialize()
        weights = f"{folder}/{name}"
        harness.save_weights(harness.build_model(Layout(), **build), weights)
        for optimizer in [MUON, ADAM] if name == "gqa" else [MUON]:
            run = train(Layout(), weights, threshold, optimizer, build)
            found[name, optimizer.get("name", "muon")] = run
    return found


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("qk_clip"))


@pytest.fixture(scope="module")
def references(pool: RankPool, initial: str) -> dict[tuple[str, str], Trained]:
    found = pool.run(train_each, 1, initial)[0]
    assert all(min(run.clipped) > 0 and run.losses[-1] < run.losses[0] for run in found.values())
    return found


QUICK = (
    "gqa-tp4, more ranks than query groups",
    "gqa-pp2_vpp2",
    "gqa-dp2_layer_wise",
    "gqa-cp2, products again",
    "gqa-adam_dp2, distributed optimizer",
    "gqa-recomputed activations",
    "mla-tp2",
    "hybrid-tp2",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def test_training_does_not_depend_on_the_layout(
    pool: RankPool, initial: str, references: dict[tuple[str, str], Trained], name: str
) -> None:
    """Heads are clipped in every step; losses, maxima over the whole model and numbers of clipped heads agree."""
    model, ranks, layout, optimizer, changes = LAYOUTS[name]
    threshold, build = MODELS[model]
    expected = references[model, optimizer.get("name", "muon")]
    for found in pool.run(train, ranks, layout, f"{initial}/{model}", threshold, optimizer, {**build, **changes}):
        assert found.losses == pytest.approx(expected.losses, abs=1e-5)
        assert found.maxima == pytest.approx(expected.maxima, rel=1e-4)
        assert found.clipped == expected.clipped


def bits(layout: Layout, weights: str, bf16: bool) -> list[torch.Tensor]:
    """The weights after steps of Adam in which heads are clipped."""
    flags = {"qk_clip": True, "qk_clip_threshold": 0.5, "bf16": bf16}
    optimizer = {**ADAM, "clip_grad": 0.0}  # its norm is summed in another order
    run = harness.start(layout, weights=weights, optimizer=optimizer, **flags, **MODELS["gqa"][1])
    run.losses(3)
    assert int(clip_of(run.chunks).heads_clipped) > 0
    return [param.detach().clone() for param in harness.unwrap(run.chunks[0]).parameters()]


def whole_and_sliced(weights: str, bf16: bool) -> list[bool]:
    """Of each weight whether Adam with the distributed optimizer, whose ranks have slices, leaves the same bits."""
    whole = bits(Layout(), weights, bf16)
    return list(map(torch.equal, whole, bits(Layout(ddp_buffers=True), weights, bf16)))


@pytest.mark.usefixtures("references")  # they save the weights
@pytest.mark.parametrize("bf16", [False, True])
def test_flat_slices_are_clipped_as_whole_weights(pool: RankPool, initial: str, bf16: bool) -> None:
    for same in pool.run(whole_and_sliced, 2, f"{initial}/gqa", bf16):
        assert same and all(same)


def masters(layer_wise: bool) -> list[tuple[bool, bool]]:
    """Of each clipped weight whether the bfloat16 copy is the rounded master, and whether the master was scaled."""
    from megatron_muon.plugin.optimizer_state import param_states

    run = harness.start(
        Layout(layer_wise=layer_wise),
        bf16=True,
        optimizer={"lr": 1e-9, "min_lr": 1e-9, "weight_decay": 0.0},
        qk_clip=True,
        qk_clip_threshold=0.05,
        **GQA,
    )
    before = {held.param: held.master.clone() for held in param_states(run.optimizer) if held.master is not None}
    run.losses(1)
    clipped = {rows.param for rows in clip_of(run.chunks).rows}
    return [
        (
            torch.equal(held.master.bfloat16(), held.param.detach()),
            not torch.allclose(held.master, before[held.param], rtol=1e-3),
        )
        for held in param_states(run.optimizer)
        if held.param in clipped
    ]


@pytest.mark.parametrize("layer_wise", [False, True])
def test_float32_masters_are_scaled_before_they_are_copied(pool: RankPool, layer_wise: bool) -> None:
    ranks = pool.run(masters, 2, layer_wise)
    found = [each for rank in ranks for each in rank]
    assert len(found) == (4 if layer_wise else 8) and all(copied and scaled for copied, scaled in found)


class Explosion(NamedTuple):
    """A training with a large learning rate on query and key projections."""

    losses: list[float]
    maxima: list[float]
    first_layer: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Logits of the first layer's heads on the batch of each step: before the update, after it, and after the clip."""


def explode(clip: bool, rate: float, projections: str, build: dict[str, Any], steps: int) -> Explosion:
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer.optimizer_config import ParamKey

    overrides = {ParamKey(name=(projections,)): {"max_lr": rate, "min_lr": rate}}
    flags = {"qk_clip": clip, "log_max_attention_logit": True, "qk_clip_threshold": THRESHOLD}
    run = harness.start(Layout(), overrides=overrides, **flags, **build)
    for part in run.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["lr"] = group["max_lr"]  # as the scheduler does
    losses, maxima, first_layer = [], [], []
    its = clip_of(run.chunks)
    for step in range(steps):
        losses += run.losses(1)
        maxima.append(its.max_logit.item())
        if clip:
            before, after = its._last[:4].clone(), logits_of_first_layer(run, step)
            with unclipped(run):
                first_layer.append((before, logits_of_first_layer(run, step), after))
    return Explosion(losses, maxima, first_layer)


def logits_of_first_layer(run: harness.Run, step: int) -> torch.Tensor:
    """Of the batch of a step, with the weights of now. What comes into the first layer no clip changes."""
    maxima = clip_of(run.chunks)._maxima
    tokens = torch.stack([run.data.tokens(step, sample)[:-1] for sample in range(run.data.global_batch)])
    mask = torch.ones(1, 1, *[tokens.size(1)] * 2).tril() < 0.5
    with torch.no_grad():
        run.chunks[0](tokens, torch.arange(tokens.size(1)).expand_as(tokens), mask)
    found = maxima[:4].clone()
    maxima.fill_(-torch.inf)
    return found


@contextlib.contextmanager
def unclipped(run: harness.Run) -> Iterator[None]:
    """With the weights as the last update left them."""
    clip = clip_of(run.chunks)
    weights = [rows.param.detach().clone() for rows in clip.rows]
    table = factor_table(clip._last, clip.heads, THRESHOLD, clip.settings.alpha, clip.settings.rule)
    for rows in clip.rows:
        rows.param.data.div_(table[rows.index][:, None])
    yield
    for rows, weight in zip(clip.rows, weights, strict=True):
        rows.param.data.copy_(weight)


THRESHOLD = 30.0


@pytest.mark.parametrize(
    ("projections", "rate", "build"),
    [
        pytest.param("*linear_qkv.weight", 0.2, GQA, id="gqa"),
        pytest.param("*_up_proj.weight", 1.0, LATENT, id="mla", marks=pytest.mark.slow),
    ],
)
def test_large_learning_rate(pool: RankPool, projections: str, rate: float, build: dict[str, Any]) -> None:
    """Without the clip logits pass 100; with it every head stays within the threshold times one step's growth."""
    free, clipped = (pool.run(explode, 1, clip, rate, projections, build, 70)[0] for clip in (False, True))
    assert max(free.maxima) > 100
    assert max(clipped.maxima) < 2 * THRESHOLD
    for before, after_update, after_clip in clipped.first_layer:
        growth = after_update / before
        bound = torch.where(before > THRESHOLD, THRESHOLD * growth, after_update)
        torch.testing.assert_close(after_clip, bound, rtol=1e-4, atol=1e-4)
    assert sum(bool((before > THRESHOLD).any()) for before, _, _ in clipped.first_layer) > 5
    first = next(step for step, value in enumerate(free.maxima) if value > THRESHOLD)
    assert clipped.losses[: first + 1] == free.losses[: first + 1]  # nothing is clipped before
    assert clipped.losses[-1] < clipped.losses[0] - 1
    assert sum(clipped.losses[-10:]) < sum(free.losses[-10:]) + 1.0
