"""Muon against Adam on the bundled text, each at its own learning rate."""

from __future__ import annotations

import math

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.text import Text
from tests.pool import RankPool

STEPS = 200
WARM_UP = 10
WINDOW = 10
"""A final loss is the mean over this many steps."""
MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 160,
    "init_method_std": 0.02,
}
# The best of 1e-3 x 2^k for each (`python -m tests.megatron.test_adam_baseline` prints the sweep).
LEARNING_RATES = {"muon": 16e-3, "adam": 2e-3}


def losses(name: str, lr: float, seed: int) -> list[float]:
    """Losses of a run with warm-up and cosine decay to a tenth."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    options = {"name": name, "lr": lr, "min_lr": lr / 10, "muon_nesterov": True}
    run = harness.start(Layout(), data=Text(order=seed), seed=seed, optimizer=options, **MODEL)
    scheduler = OptimizerParamScheduler(
        run.optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=lr / 10,
        lr_warmup_steps=WARM_UP,
        lr_decay_steps=STEPS,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=STEPS,
        wd_incr_style="constant",
    )
    result = []
    for _ in range(STEPS):
        scheduler.step(1)
        result += run.losses(1)
    return result


def final(values: list[float]) -> float:
    return math.fsum(values[-WINDOW:]) / WINDOW


def steps_to(values: list[float], target: float) -> int | None:
    """The first step at which the mean of the last window is at most ``target``."""
    for step in range(WINDOW, len(values) + 1):
        if math.fsum(values[step - WINDOW : step]) / WINDOW <= target:
            return step
    return None


@pytest.mark.parametrize("seed", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_muon_reaches_adams_loss_in_three_quarters_of_the_steps(pool: RankPool, seed: int) -> None:
    adam = pool.run(losses, 1, "adam", LEARNING_RATES["adam"], seed)[0]
    muon = pool.run(losses, 1, "muon", LEARNING_RATES["muon"], seed)[0]
    assert final(adam) < 0.8 * adam[0], "the baseline must have learnt something"
    steps = steps_to(muon, final(adam))
    assert steps is not None and steps <= 0.75 * STEPS, f"{steps} of {STEPS} steps"
    assert final(muon) < final(adam)


def main() -> None:
    """Print the sweep that the learning rates are taken from."""
    pool = RankPool()
    for name in LEARNING_RATES:
        for power in range(6):
            lr = 1e-3 * 2**power
            print(name, lr, *(f"{final(pool.run(losses, 1, name, lr, seed)[0]):.4f}" for seed in (1, 2)), flush=True)
    pool.close()


if __name__ == "__main__":
    main()
