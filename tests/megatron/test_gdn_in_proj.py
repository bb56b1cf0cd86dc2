"""GatedDeltaNet's fused in_proj in training: each policy against its formula, at every layout, and over a resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_muon.orthogonalize import iteration
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN
from tests.pool import RankPool
from tests.reference import orthogonalized

NAMES = ("q", "k", "v", "z", "beta", "alpha")
GATES = ("beta", "alpha")
LR, DECAY, MOMENTUM, EXTRA, BETAS, EPS = 0.01, 0.1, 0.95, 0.2, (0.9, 0.95), 1e-8


class Trained(NamedTuple):
    """One rank's shard of an in_proj.

    Attributes:
        sections: rows of q, k, v, z, beta and alpha on this rank, by the module.
        weights: before the first step, and after each.
        gradients: as clipped for each step.
        optimizer: the class of the optimizer that holds it.
    """

    sections: tuple[int, ...]
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    optimizer: str


def start(layout: Layout, policy: str, optimizer: dict[str, Any] | None = None, **options: Any) -> harness.Run:
    """The hybrid; DDP's buffers of a layer-wise run follow from the policy too, before the optimizer is made."""
    import megatron_muon

    megatron_muon.install(megatron_muon.MuonConfig(gdn_in_proj=policy))
    optimizer = {"muon_gdn_in_proj": policy, **(optimizer or {})}
    return harness.start(layout, optimizer=optimizer, **options, **GDN)


def train_one_weight(layout: Layout, policy: str, steps: int) -> Trained:
    """Train the hybrid; what happens to the in_proj of its first layer."""
    run = start(layout, policy)
    attention = harness.unwrap(run.chunks[0]).decoder.layers[0].self_attention
    param = attention.in_proj.weight
    weights, gradients = [param.detach().clone()], []
    for _ in range(steps):
        run.losses(1)
        weights.append(param.detach().clone())
        gradients.append(param.main_grad.clone())  # Megatron clips in place
    owners = [
        "AdamW" if isinstance(inner, torch.optim.AdamW) else type(inner).__name__
        for inner in inner_optimizers(run)
        if any(param is other for group in inner.param_groups for other in group["params"])
    ]
    assert len(owners) == 1
    return Trained(tuple(attention.in_proj_split_sections), weights, gradients, owners[0])


def inner_optimizers(run: harness.Run) -> Iterator[Any]:
    """The torch optimizers in Megatron's wrappers."""

    def parts(optimizer: Any) -> Iterator[Any]:
        chained = getattr(optimizer, "chained_optimizers", None)
        if chained is None:
            yield optimizer.optimizer
        for part in chained or []:
            yield from parts(part)

    yield from parts(run.optimizer)


def logical(ranks: list[Trained], shards: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> rows of all ranks, in float64."""
    parts = [shard.double().split(rank.sections) for rank, shard in zip(ranks, shards, strict=True)]
    return {name: torch.cat(rows) for name, rows in zip(NAMES, zip(*parts, strict=True), strict=True)}


def muon(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    buffer = torch.zeros_like(weight)
    for gradient in gradients:
        buffer = MOMENTUM * buffer + (1 - MOMENTUM) * gradient
        direction = orthogonalized(buffer, iteration("quintic", 5).coefficients) * max(weight.shape) ** 0.5
        weight = (1 - LR * DECAY) * weight - LR * EXTRA * direction
    return weight


def adamw(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        ratio = (first / (1 - BETAS[0] ** step)) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPS)
        weight = (1 - LR * DECAY) * weight - LR * ratio
    return weight


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("policy,optimizer", [("split", "Muon"), ("adam", "AdamW")])
def test_update_is_that_of_the_logical_blocks(pool: RankPool, tp: int, policy: str, optimizer: str) -> None:
    """Real gradients of a hybrid: Muon on q, k, v, z and AdamW on the gates' rows, or AdamW on all."""
    steps = 2
    ranks = pool.run(train_one_weight, tp, Layout(tp=tp), policy, steps)
    assert {rank.optimizer for rank in ranks} == {optimizer}
    before = logical(ranks, [rank.weights[0] for rank in ranks])
    after = logical(ranks, [rank.weights[-1] for rank in ranks])
    gradients = [logical(ranks, [rank.gradients[step] for rank in ranks]) for step in range(steps)]
    shapes = {"q": 16, "k": 16, "v": 32, "z": 32, "beta": 4, "alpha": 4}
    assert {name: tuple(block.shape) for name, block in before.items()} == {n: (m, 32) for n, m in shapes.items()}
    for name in NAMES:
        rule = adamw if policy == "adam" or name in GATES else muon
        expected = rule(before[name], [each[name] for each in gradients])
        # float32 against float64: the weights are of size 0.1 and an update moves them by 2e-3 to 1e-2 a step.
        torch.testing.assert_close(
            after[name], expected, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert (after[name] - before[name]).abs().mean() > 1e-3, name


STEPS = 8
# As in tests/megatron/test_layouts.py. Adam divides gradients by their size, the smallest of which are rounding alone:
# at learning rates of 0.01 that grows to 6e-6 in eight steps of this model, at 0.003 to 8e-7.
TOLERANCE = 4e-6
SLOW = {"lr": 0.003, "min_lr": 0.003}


@pytest.fixture(scope="module")
def weights(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("weights") / "initial")
    pool.run(harness.save_initial_weights, 1, folder, **GDN)
    return folder


def losses(layout: Layout, weights: str, policy: str) -> list[float]:
    return start(layout, policy, SLOW, weights=weights).losses(STEPS)


TP, OWNED, TP_OWNED = (2, Layout(tp=2)), (2, Layout(layer_wise=True)), (4, Layout(tp=2, layer_wise=True))


@pytest.mark.parametrize(
    ("policy", "layouts"),
    [
        pytest.param("split", [TP_OWNED], id="split"),
        pytest.param("split", [TP, OWNED], id="split, fewer ranks", marks=pytest.mark.slow),
        *(pytest.param(each, [TP, OWNED, TP_OWNED], id=each, marks=pytest.mark.slow) for each in ("adam", "per_head")),
    ],
)
def test_losses_do_not_depend_on_the_layout(
    pool: RankPool, weights: str, policy: str, layouts: list[tuple[int, Layout]]
) -> None:
    expected = pool.run(losses, 1, Layout(), weights, policy)[0]
    assert expected[-1] < expected[0] - 0.5
    for world_size, layout in layouts:
        found = pool.run(losses, world_size, layout, weights, policy)
        assert all(rank == found[0] for rank in found)
        assert found[0] == pytest.approx(expected, abs=TOLERANCE), layout


State = dict[str, Any]


def muon_state(run: harness.Run) -> list[State]:
    """Of every in_proj that this rank's Muon holds: its step, its second moment, and which rows follow Adam."""
    found = []
    for inner in inner_optimizers(run):
        for group in inner.param_groups:
            for param in group["params"]:
                layout = getattr(param, "matrix_layout", None)
                if type(inner).__name__ == "Muon" and layout is not None and layout.has_scalar_rows:
                    scalar = [section.rows for section in layout.sections if section.rule == "scalar"]
                    state = inner.state[param]
                    found.append(
                        {
                            "step": group["step"],
                            "gates": sum(scalar),
                            "exp_avg_sq": state["exp_avg_sq"].clone(),
                            "momentum_buffer": state["momentum_buffer"].clone(),
                        }
                    )
    return found


def straight(layout: Layout, bf16: bool) -> list[float]:
    return start(layout, "split", bf16=bf16).losses(8)


def first_half(layout: Layout, bf16: bool, folder: str) -> tuple[list[float], list[State]]:
    run = start(layout, "split", bf16=bf16)
    losses = run.losses(4)
    harness.save_run(run, folder)
    return losses, muon_state(run)


def second_half(layout: Layout, bf16: bool, folder: str) -> tuple[list[float], list[State]]:
    run = start(layout, "split", bf16=bf16)
    run.losses(1)  # the state that is loaded must replace what is there
    harness.load_run(run, folder)
    state = muon_state(run)
    return run.losses(4), state


@pytest.mark.parametrize(
    "world_size,layout,bf16",
    [
        (2, Layout(tp=2), False),
        pytest.param(4, Layout(tp=2, layer_wise=True), True, marks=pytest.mark.slow),
    ],
)
def test_resume_with_rows_under_two_rules(
    pool: RankPool, tmp_path: Path, world_size: int, layout: Layout, bf16: bool
) -> None:
    """Bit for bit; the second moment and the number of steps are what only this policy keeps in Muon."""
    whole = pool.run(straight, world_size, layout, bf16)[0]
    folder = str(tmp_path / "checkpoint")
    first = pool.run(first_half, world_size, layout, bf16, folder)
    second = pool.run(second_half, world_size, layout, bf16, folder)
    assert first[0][0] + second[0][0] == whole
    held = 0
    for (_, saved), (_, loaded) in zip(first, second, strict=True):
        assert len(saved) == len(loaded)
        held += len(saved)
        for before, after in zip(saved, loaded, strict=True):
            assert before["step"] == after["step"] == 4
            assert torch.equal(before["exp_avg_sq"], after["exp_avg_sq"])
            assert torch.equal(before["momentum_buffer"], after["momentum_buffer"])
            second_moment, gates = after["exp_avg_sq"], after["gates"]
            assert (second_moment > 0).any() and second_moment.size(0) == gates
    assert held == 2 * layout.tp if layout.layer_wise else 2 * world_size
