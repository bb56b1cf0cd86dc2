"""Gradients that come and go, of experts without tokens and beside a huge one, on ranks of Megatron-Core."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_routing import MOE
from tests.pool import RankPool
from tests.slow import with_slow

SMALL = {"num_layers": 2}
TOLERANCE = 4e-6
"""Of losses: layouts add the same numbers in another order, by 4e-7 at most here."""
LAYOUTS = {
    "tp2": (2, Layout(tp=2), {}),
    "dp2": (2, Layout(), {}),
    "tp2_dp2_layer_wise": (4, Layout(tp=2, ddp_buffers=True, layer_wise=True), {}),
    "tp2_dp2_layer_wise_lists": (4, Layout(tp=2, layer_wise=True), {"param_layout": False}),
}


def matrices(run: Run) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Muon's weights on this rank, with their names in the whole model."""
    from megatron_muon.routing import _is_nonlinear_or_embedding, global_names

    named = (each for chunk in run.chunks for each in global_names(chunk))
    return ((name, param) for name, param in named if param.requires_grad and not _is_nonlinear_or_embedding(param))


@contextlib.contextmanager
def without(params: list[torch.nn.Parameter]) -> Iterator[None]:
    """Within, these have no gradient, as it is without DDP where nothing has come."""
    saved = [param.main_grad for param in params]
    for param in params:
        param.main_grad = None
    try:
        yield
    finally:
        for param, grad in zip(params, saved, strict=True):
            param.main_grad = grad


def in_patterns(layout: Layout, weights: str, steps: int, patterns: int, options: dict[str, Any]) -> list[float]:
    """Losses, when every third of Muon's weights has no gradient, in one of ``patterns`` that take turns."""
    run = harness.start(layout, weights=weights, **SMALL, **options)
    step = run.optimizer.step

    def some() -> Any:
        turn = run.step % patterns
        with without([param for name, param in matrices(run) if zlib.crc32(f"{turn} {name}".encode()) % 3 == 0]):
            return step()

    run.optimizer.step = some
    return run.losses(steps)


@pytest.fixture(scope="module")
def weights(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("weights") / "initial")
    pool.run(harness.save_initial_weights, 1, folder, **SMALL)
    return folder


@pytest.mark.parametrize("name", with_slow(LAYOUTS, "tp2", "dp2", "tp2_dp2_layer_wise_lists"))
@pytest.mark.parametrize("steps", with_slow(["16", "300"], "300"))
def test_losses_where_gradients_come_and_go(pool: RankPool, weights: str, name: str, steps: str) -> None:
    """More patterns than plans are kept. A weight without a gradient stays, on all of its ranks."""
    ranks, layout, options = LAYOUTS[name]
    expected = pool.run(in_patterns, 1, Layout(), weights, int(steps), 12, {}, timeout=900)[0]
    for losses in pool.run(in_patterns, ranks, layout, weights, int(steps), 12, options, timeout=900):
        # Steps multiply what sums in another order differ by.
        assert losses == pytest.approx(expected, abs=TOLERANCE if steps == "16" else 1e-3)
    assert expected[-1] < 0.9 * expected[0]


def stopped(layout: Layout, model: dict[str, Any]) -> list[tuple[str, bool]]:
    """What each of these ranks says, and whether anything has changed, when one lacks the gradient of a weight.

    First of one that ranks share, in the third step; then of its own experts alone, if there are any.
    """
    run = harness.start(layout, optimizer={"clip_grad": 0.0}, **SMALL, **model)
    run.losses(2)
    odd, found = dist.get_rank() == dist.get_world_size() - 1, []
    for part in ("linear_fc1.weight" if not model else "linear_proj.weight", "experts"):
        mine = [param for name, param in matrices(run) if part in name][:1] if odd else []
        before = [param.detach().clone() for chunk in run.chunks for param in chunk.parameters()]
        message = ""
        with without(mine):
            try:
                run.optimizer.step()
            except RuntimeError as error:
                message = str(error)
        after = [param for chunk in run.chunks for param in chunk.parameters()]
        found.append((message, all(torch.equal(*pair) for pair in zip(before, after, strict=True))))
    return found


@pytest.mark.parametrize("layout,model", [(Layout(tp=2), {}), (Layout(), {}), (Layout(ep=2), MOE)], ids=repr)
def test_a_gradient_on_one_rank_alone_stops_all(pool: RankPool, layout: Layout, model: dict[str, Any]) -> None:
    """Shards and copies, in a later step; experts that the rank has for itself go their own way."""
    first, second = pool.run(stopped, 2, layout, model)
    assert first == second
    (message, same), (other, still) = first
    assert "has a gradient on ranks [0] and none on ranks [1], which hold parts or copies of it" in message and same
    assert message.startswith("Muon: decoder.layers.0.") and other == "" and not still


# --- experts without tokens ------------------------------------------------------------------------------------------

STARVED = {**MOE, "num_moe_experts": 4, "moe_router_topk": 1, "moe_router_pre_softmax": True, **SMALL}
EXPERTS = {
    "ep2": (2, Layout(ep=2)),
    "dp2_layer_wise": (2, Layout(ddp_buffers=True, layer_wise=True)),
    "tp2_ep2": (4, Layout(tp=2, ep=2, etp=1, sp=True)),
}


def starve(layout: Layout, weights: str, steps: int, options: dict[str, Any]) -> tuple[list[float], float]:
    """Losses with frozen routers, which give all tokens to one expert of each layer after three steps of all.

    Returns:
        the losses, and which part of the elements of this rank's experts has a gradient of zero in the end.
    """
    import megatron_muon

    megatron_muon.install()
    layout.initialize()
    from megatron.core.optimizer import get_megatron_optimizer

    chunks = harness.build_model(layout, **STARVED)
    routers = [param for chunk in chunks for name, param in chunk.named_parameters() if "router" in name]
    for router in routers:
        router.requires_grad_(False)
    chunks = harness.wrap(chunks, layout)
    harness.load_weights(chunks, weights)
    config = harness.optimizer_config(layout, **options)
    run = Run(layout, chunks, get_megatron_optimizer(config, chunks))
    losses = run.losses(3)
    for router in routers:
        router.data.zero_()
    losses += run.losses(steps)
    grads = torch.cat([param.main_grad.flatten() for name, param in matrices(run) if ".experts." in name])
    return losses, (grads == 0).float().mean().item()


OPTIMIZERS = {
    "muon": {},
    "namo": {"optimizer": "adaptive_muon", "adaptive_muon_moment2_method": "namo", "muon_scale_mode": "none"},
}


@pytest.mark.parametrize("optimizer", with_slow(OPTIMIZERS, "namo"))
@pytest.mark.parametrize("steps", with_slow(["8", "200"], "200"))
def test_experts_without_tokens(pool: RankPool, tmp_path: Path, optimizer: str, steps: str) -> None:
    """Their momentum fades and moves them on, as it does on one rank, wherever they are; frozen routers stay."""
    folder, options = str(tmp_path / "initial"), OPTIMIZERS[optimizer]
    pool.run(harness.save_initial_weights, 1, folder, **STARVED)
    ((expected, zeros),) = pool.run(starve, 1, Layout(), folder, int(steps), options, timeout=900)
    assert zeros > 0.7, "three of four experts"
    # Of eight steps those ranks that hold experts whole beside divided weights; the slow test has the others too.
    for name, (ranks, layout) in EXPERTS.items() if steps != "8" else [("tp2_ep2", EXPERTS["tp2_ep2"])]:
        for losses, _ in pool.run(starve, ranks, layout, folder, int(steps), options, timeout=900):
            assert losses == pytest.approx(expected, abs=TOLERANCE if steps == "8" else 1e-3), name


# --- one huge gradient, and all others clipped ------------------------------------------------------------------------


def beside_a_huge_one(layout: Layout, name: str, bf16: bool) -> list[list[float]]:
    """How large updates of the other matrices are in three steps, as multiples of those where nothing is huge.

    In the first step the gradient of ``name`` is 1e9 times itself, so that clipping to 1.0 scales all others to 1e-9.
    """
    from megatron_muon.plugin.optimizer_state import param_states

    updates = []
    for factor in (1.0, 1e9):
        run = harness.start(layout, bf16=bf16, **SMALL)
        step, found = run.optimizer.step, []

        def scaled(run: Run = run, step: Any = step, found: Any = found, factor: float = factor) -> Any:
            for chunk in run.chunks:
                for full, param in chunk.named_parameters():
                    if full.endswith(name) and run.step == 0:
                        param.main_grad.mul_(factor)
            # What this rank owns, by masters: other weights are on their way still, or come with the next forward pass.
            names = {param: each for each, param in matrices(run) if not each.endswith(name)}
            mine = [
                its.param if its.master is None else its.master
                for its in param_states(run.optimizer)
                if its.param in names
            ]
            before = [weight.detach().clone() for weight in mine]
            answer = step()
            found.append([(weight.detach() - old).norm() for weight, old in zip(mine, before, strict=True)])
            return answer

        run.optimizer.step = scaled
        run.losses(3)
        assert factor == 1.0 or run.gradient_norms[0] > 1e7
        updates.append(found)
    pairs = zip(*updates, strict=True)
    return [[float(huge / usual) for usual, huge in zip(*pair, strict=True)] for pair in pairs]


@pytest.mark.parametrize(
    "layout,name,bf16",
    [
        (Layout(tp=2), "layers.0.mlp.linear_fc2.weight", False),
        (Layout(ddp_buffers=True, layer_wise=True), "word_embeddings.weight", True),
    ],
    ids=["tp2", "layer_wise"],
)
def test_a_huge_gradient_does_not_stop_other_matrices(pool: RankPool, layout: Layout, name: str, bf16: bool) -> None:
    on_ranks = pool.run(beside_a_huge_one, 2, layout, name, bf16)
    assert sum(len(sizes[0]) for sizes in on_ranks) >= 7
    for sizes in on_ranks:
        # Directions differ from the second step on: momentum has next to nothing of the first gradient.
        for ratios, tolerance in zip(sizes, (0.01, 0.1, 0.1), strict=True):
            assert all(ratio == pytest.approx(1.0, abs=tolerance) for ratio in ratios), sizes
