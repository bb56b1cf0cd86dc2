"""Context parallelism: one model, its sequences on one rank or divided over several.

Mamba's mixer and GatedDeltaNet exchange heads for tokens, attention gathers keys and values, and MLPs and experts see
one token at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_muon.errors import ConfigError
from megatron_muon.monitor import metrics
from tests.launch import FLAGS, ROOT, check, launch
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_cpu_mamba import MAMBA as MAMBA_AND_ATTENTION
from tests.megatron.test_gdn_in_proj import inner_optimizers
from tests.megatron.test_routing import GDN, MLA, MOE
from tests.pool import RankPool
from tests.slow import with_slow

MAMBA: dict[str, Any] = {**MAMBA_AND_ATTENTION, "pattern": "M-M-"}
# As many heads of keys as of values, so that they can be divided over four ranks.
DELTA: dict[str, Any] = {
    **MAMBA,
    **MOE,
    "pattern": "G-ME",
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
}
POLICY = {"mamba_in_proj": "split", "gdn_in_proj": "split"}
ATTENTION: dict[str, Any] = {"num_query_groups": 2}
LATENT: dict[str, Any] = {**MLA, "position": "rope"}
STEPS = 8


class Model(NamedTuple):
    """What is trained and how far layouts may differ: ten times what was measured over all layouts of this file.

    Attributes:
        build: for :func:`harness.build_model`.
        rate: learning rate. Adam divides gradients by their size, also those that are rounding alone, so that a greater
            one would carry more of it into GatedDeltaNet's gates (see test_layouts.py).
        weights: greatest absolute difference after the last step.
        moved: every weight has an element that training has moved by more than this.
    """

    build: dict[str, Any]
    rate: float
    weights: float
    moved: float


# float32. Measured (tensor or data parallelism / context parallelism, alone or with others): losses of about 4 differ
# by up to 3.0e-7 / 3.0e-7, norms of gradients by 3.6e-7 / 4.2e-7 of their size, weights of MAMBA by 2.7e-7 / 4.8e-7,
# those of DELTA by 1.6e-6 / 1.4e-6, of ATTENTION by 2.5e-7 / 4.4e-7, of LATENT by 1.2e-7 (data) / 2.1e-6, of the hybrid
# with attention by 1.5e-5 / 3.2e-6.
MODELS = {
    "mamba": Model(MAMBA, rate=0.01, weights=5e-6, moved=0.04),
    "delta": Model(DELTA, rate=0.003, weights=1.5e-5, moved=0.009),
    "attention": Model(ATTENTION, rate=0.01, weights=5e-6, moved=0.03),
    "latent": Model(LATENT, rate=0.003, weights=2e-5, moved=0.009),
    "hybrid": Model(MAMBA_AND_ATTENTION, rate=0.01, weights=3e-5, moved=0.04),
}
LOSS_TOLERANCE = 4e-6
NORM_TOLERANCE = 4e-6


class Trained(NamedTuple):
    """What a run did, on one rank."""

    losses: list[float]
    norms: list[float]


def start(layout: Layout, rate: float, **options: Any) -> harness.Run:
    """A run with fused projections split; DDP's buffers follow from the policy too, before the optimizer is made."""
    import megatron_muon

    megatron_muon.install(megatron_muon.MuonConfig(**POLICY))
    optimizer = {"lr": rate, "min_lr": rate, **{f"muon_{name}": value for name, value in POLICY.items()}}
    return harness.start(layout, optimizer=optimizer, **options)


def train(layout: Layout, rate: float, weights: str, result: str, build: dict[str, Any]) -> Trained:
    """Train from the weights in one folder and leave the trained ones in another."""
    run = start(layout, rate, weights=weights, **build)
    losses = run.losses(STEPS)
    harness.save_weights(run.chunks, result)
    return Trained(losses, run.gradient_norms)


def read(folder: str, build: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The whole weights in a folder."""
    Layout().initialize()
    chunks = harness.build_model(Layout(), **build)
    harness.load_weights(chunks, folder)
    return {name: param.detach().clone() for name, param in chunks[0].named_parameters()}


class Reference(NamedTuple):
    """A model trained on one rank."""

    initial: str
    trained: Trained
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reference_of(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Made when a case asks for the model."""
    folder = tmp_path_factory.mktemp("context")

    @functools.cache
    def of(name: str) -> Reference:
        model = MODELS[name]
        initial, result = str(folder / f"{name}-initial"), str(folder / f"{name}-trained")
        pool.run(harness.save_initial_weights, 1, initial, **model.build)
        trained = pool.run(train, 1, Layout(), model.rate, initial, result, model.build)[0]
        before, after = (pool.run(read, 1, place, model.build)[0] for place in (initial, result))
        assert min((after[key] - before[key]).abs().max() for key in after) > model.moved
        assert trained.losses[-1] < trained.losses[0] - 0.5
        return Reference(initial, trained, after)

    return of


CASES = {
    "mamba-cp2": ("mamba", 2, Layout(cp=2), {}),
    "mamba-cp4": ("mamba", 4, Layout(cp=4), {}),  # more ranks than groups of B and C
    "mamba-cp2_tp2": ("mamba", 4, Layout(cp=2, tp=2), {}),
    "mamba-cp2_pp2": ("mamba", 4, Layout(cp=2, pp=2), {"pattern": "M-|M-"}),
    "mamba-cp2_dp2": ("mamba", 4, Layout(cp=2), {}),
    "mamba-cp2_layer_wise": ("mamba", 2, Layout(cp=2, layer_wise=True), {}),
    "mamba-cp2_dp2_layer_wise": ("mamba", 4, Layout(cp=2, layer_wise=True), {}),
    "delta-cp2": ("delta", 2, Layout(cp=2), {}),
    "delta-cp4": ("delta", 4, Layout(cp=4), {}),
    "delta-cp2_ep2": ("delta", 2, Layout(cp=2, ep=2), {}),
    "delta-cp2_tp2_sp": ("delta", 4, Layout(cp=2, tp=2, sp=True), {}),
    "attention-cp2": ("attention", 2, Layout(cp=2), {}),
    "attention-cp4": ("attention", 4, Layout(cp=4), {}),
    "attention-cp2_tp2_sp": ("attention", 4, Layout(cp=2, tp=2, sp=True), {}),
    "attention-cp2_pp2": ("attention", 4, Layout(cp=2, pp=2), {}),
    "latent-cp2": ("latent", 2, Layout(cp=2), {}),
    "hybrid-cp2_layer_wise": ("hybrid", 2, Layout(cp=2, layer_wise=True), {}),
    "delta-cp2_dp2_ep2_layer_wise": ("delta", 4, Layout(cp=2, ep=2, layer_wise=True), {}),
}


SLOW = (
    *("attention-cp2", "mamba-cp4", "mamba-cp2_tp2", "mamba-cp2_pp2", "mamba-cp2_dp2", "mamba-cp2_layer_wise"),
    *("mamba-cp2_dp2_layer_wise", "delta-cp4", "delta-cp2_ep2", "delta-cp2_tp2_sp", "attention-cp4"),
    *("attention-cp2_pp2", "hybrid-cp2_layer_wise", "delta-cp2_dp2_ep2_layer_wise"),
)


@pytest.mark.parametrize("name", with_slow(CASES, *SLOW))
def test_training_does_not_depend_on_context_parallelism(
    pool: RankPool, tmp_path: Path, reference_of: Callable[[str], Reference], name: str
) -> None:
    """Losses, norms of the gradients, and all weights after the last step."""
    model_name, world_size, layout, changes = CASES[name]
    model, reference = MODELS[model_name], reference_of(model_name)
    result, build = str(tmp_path / "trained"), {**model.build, **changes}
    ranks = pool.run(train, world_size, layout, model.rate, reference.initial, result, build)
    assert all(rank.losses == ranks[0].losses for rank in ranks)
    assert ranks[0].losses == pytest.approx(reference.trained.losses, abs=LOSS_TOLERANCE)
    # Neither Muon nor Adam depends on the scale of gradients, so that a wrong one would show here only.
    assert ranks[0].norms == pytest.approx(reference.trained.norms, rel=NORM_TOLERANCE)
    weights = pool.run(read, 1, result, model.build)[0]
    assert weights.keys() == reference.weights.keys()
    for key, expected in reference.weights.items():
        torch.testing.assert_close(
            weights[key], expected, rtol=0, atol=model.weights, msg=lambda text, key=key: f"{key}: {text}"
        )


def owned(layout: Layout) -> set[str]:
    """Names of the weights that this rank's Muon updates."""
    run = start(layout, 0.01, **MAMBA)
    names = {param: name for name, param in run.chunks[0].named_parameters()}
    muons = [inner for inner in inner_optimizers(run) if type(inner).__name__ == "Muon"]
    return {names[param] for muon in muons for group in muon.param_groups for param in group["params"]}


def test_context_parallel_ranks_share_layer_wise_work(pool: RankPool) -> None:
    """Data- and context-parallel ranks together: each Muon weight has one owner among the four."""
    ranks = pool.run(owned, 4, Layout(cp=2, layer_wise=True))
    everything = pool.run(owned, 1, Layout())[0]
    assert len(everything) == 8
    assert all(ranks), "every rank has work"
    assert sum(map(len, ranks)) == 8 and set.union(*ranks) == everything


def first_half(layout: Layout, folder: str) -> tuple[list[float], list[float]]:
    run = start(layout, 0.01, **MAMBA)
    before = run.losses(3)
    harness.save_run(run, folder)
    return before, run.losses(3)


def second_half(layout: Layout, folder: str) -> list[float]:
    run = start(layout, 0.01, **MAMBA)
    run.losses(1)  # the state that is loaded must replace what is there
    harness.load_run(run, folder)
    return run.losses(3)


@pytest.mark.slow
@pytest.mark.parametrize("layer_wise", [False, True])
def test_resume(pool: RankPool, tmp_path: Path, layer_wise: bool) -> None:
    layout, folder = Layout(cp=2, layer_wise=layer_wise), str(tmp_path / "checkpoint")
    before, after = pool.run(first_half, 4, layout, folder)[0]
    assert pool.run(second_half, 4, layout, folder)[0] == after != before


def window(layout: Layout) -> str:
    """What building a model with a sliding window raises."""
    layout.initialize()
    try:
        harness.build_model(layout, window_size=(4, 0))
    except ConfigError as error:
        return str(error)
    return ""


def test_sliding_windows_are_refused(pool: RankPool) -> None:
    message, _ = pool.run(window, 2, Layout(cp=2))
    assert message.startswith("--context-parallel-size = 2 with --window-size on the CPU") and "leave one" in message
    assert pool.run(window, 1, Layout())[0] == ""


def train_delta_gpt(layout: Layout) -> list[float]:
    return start(layout, 0.003, **{**GDN, "linear_attention_freq": [1] * 4}).losses(4)


def test_gpt_with_linear_attention_only(pool: RankPool) -> None:
    """No pattern tells of its layers; the same seed gives the same weights at both layouts."""
    expected = pool.run(train_delta_gpt, 1, Layout())[0]
    assert pool.run(train_delta_gpt, 2, Layout(cp=2))[0] == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert expected[-1] < expected[0]


def test_unedited_script(tmp_path: Path) -> None:
    """Megatron-LM's own loop, data loader and loss; the same seed gives the same weights."""
    script = ROOT / "examples" / "pretrain_hybrid.py"
    spec = "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"
    model = "--hybrid-layer-pattern MG- --mamba-state-dim 8 --mamba-head-dim 8 --mamba-num-heads 16 "
    model += "--mamba-num-groups 2 --linear-num-key-heads 4 --linear-num-value-heads 4 --linear-key-head-dim 8 "
    model += "--linear-value-head-dim 8 --muon-mamba-in-proj split --muon-fp32-matmul-prec highest"
    curves = []
    for ranks in (1, 2):
        log = tmp_path / f"{ranks}.jsonl"
        flags = f"{FLAGS} {model} {spec} --optimizer muon --train-iters 4 --muon-log-jsonl {log}".split()
        check(launch(str(script), *flags, "--context-parallel-size", str(ranks), ranks=ranks))
        curves.append([point.loss for point in metrics.read(log).train])
    one, two = curves
    assert len(one) == 4 and one[-1] < one[0]
    assert two == pytest.approx(one, abs=LOSS_TOLERANCE)
