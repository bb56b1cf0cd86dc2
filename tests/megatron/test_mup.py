"""Megatron's ``--use-mup`` on real models: rates and eps of every weight, as ``megatron.training`` asks for them.

The rule (Yang et al., arXiv 2203.03466, table 8; width D times the base's): Adam's matrices get the learning rate and
eps / D, tables, output layers (whose logits are divided by D) and vectors keep theirs. Muon's matrices keep theirs,
too: their updates have the size that the scale mode gives them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_muon.routing.layout import SCALAR, layout_of
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_routing import GDN
from tests.pool import RankPool

LR, MIN_LR, SCALAR_LR, EPS, WIDTH = 0.01, 0.001, 0.004, 1e-8, 4.0
MODEL = {**GDN, "use_mup": True, "mup_base_hidden_size": 8}  # the harness's model has hidden size 32
OPTIMIZER = {"lr": LR, "min_lr": MIN_LR, "adam_eps": EPS, "clip_grad": 0.0, "muon_gdn_in_proj": "split"}
STIEFEL = {"name": "stiefel_muon", "muon_param_rule": ("*.linear_proj.weight=stiefel",)}

Numbers = dict[str, dict[str, float | None]]


def start(layout: Layout, changes: dict[str, Any]) -> Run:
    """As ``megatron.training.setup_model_and_optimizer`` puts the overrides together."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import get_mup_config_overrides, get_standard_config_overrides

    config = harness.optimizer_config(layout, **{**OPTIMIZER, **changes})
    overrides = {**get_standard_config_overrides(config), **get_mup_config_overrides(config, WIDTH, config.optimizer)}
    return harness.start(layout, optimizer={**OPTIMIZER, **changes}, overrides=overrides, **MODEL)


def numbers(run: Run) -> Numbers:
    from megatron_muon.routing.annotate import global_names

    names = {param: name for chunk in run.chunks for name, param in global_names(chunk)}
    found = {}
    for group in run.optimizer.param_groups:
        keys = ("max_lr", "min_lr", "eps", "scalar_lr_mult", "scalar_eps")
        found.update({names[param]: {key: group.get(key) for key in keys} for param in group["params"]})
    return found


def groups(layout: Layout, cases: list[dict[str, Any]]) -> list[Numbers]:
    return [numbers(start(layout, case)) for case in cases]


CASES: list[dict[str, Any]] = [
    {"name": "muon"},
    {"name": "adaptive_muon"},
    {"name": "spectral_sphere"},
    STIEFEL,
    {"name": "muon", "muon_scalar_lr": SCALAR_LR},
    {"name": "muon", "decoupled_lr": 0.002, "decoupled_min_lr": 0.002},
    {"name": "muon", "muon_gdn_in_proj": "adam", "muon_router": "adam"},
]


EACH = pytest.mark.parametrize(
    "layout", [pytest.param(Layout(), marks=pytest.mark.slow), Layout(tp=2)], ids=["tp1", "tp2"]
)


@EACH
def test_every_weight_has_the_rate_of_the_rule(pool: RankPool, layout: Layout) -> None:
    for rank in pool.run(groups, layout.tp, layout, CASES):
        for case, found in zip(CASES, rank, strict=True):
            base = case.get("muon_scalar_lr", LR)
            vectors = {"max_lr": base, "min_lr": MIN_LR * base / LR, "eps": EPS}
            matrices = {"max_lr": base / WIDTH, "min_lr": MIN_LR * base / LR / WIDTH, "eps": EPS / WIDTH}
            ends = {**vectors, "max_lr": 0.002, "min_lr": 0.002} if "decoupled_lr" in case else vectors
            for name, group in found.items():
                told = f"{case}: {name}"
                if "word_embeddings" in name or "output_layer" in name:
                    expected = ends
                elif "conv1d" in name or (name.endswith("in_proj.weight") and case.get("muon_gdn_in_proj") == "adam"):
                    expected = matrices
                elif group["scalar_lr_mult"] is None:
                    expected = vectors
                else:  # Muon's: and what rows under Adam in them get
                    expected = {"max_lr": LR, "min_lr": MIN_LR, "eps": None}
                    assert group["scalar_lr_mult"] == pytest.approx(base / LR / WIDTH), told
                    assert group["scalar_eps"] == pytest.approx(EPS / WIDTH), told
                assert {key: group[key] for key in expected} == pytest.approx(expected), told
            assert sum(group["scalar_lr_mult"] is not None for group in found.values()) > 10


def with_a_rate_of_muons_own() -> Numbers:
    """An override of the user's for what Muon updates, as ms-swift makes one of its ``muon_lr``."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    key = ParamKey(predicate=ParamPredicate(name="muon", fn=is_managed_by_layer_wise_optimizer))
    overrides = {key: {"max_lr": 10 * LR, "min_lr": 10 * MIN_LR}}
    return numbers(harness.start(Layout(), optimizer=OPTIMIZER, overrides=overrides, **GDN))


def test_rows_do_not_get_a_rate_that_is_muons_alone(pool: RankPool) -> None:
    (found,) = pool.run(with_a_rate_of_muons_own, 1)
    rows = next(group for name, group in found.items() if name.endswith("in_proj.weight"))
    assert rows["max_lr"] == 10 * LR and rows["scalar_lr_mult"] == pytest.approx(0.1)


def first_updates(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the gates' rows in an ``in_proj``: as rows of a weight of Muon's, and where all of it is Adam's."""
    updates = []
    rows: torch.Tensor | None = None
    for choice in ("split", "adam"):
        run = start(layout, {"muon_gdn_in_proj": choice})
        weight = next(
            param
            for name, param in run.chunks[0].named_parameters()
            if name.endswith("layers.0.self_attention.in_proj.weight")
        )
        if rows is None:
            numbered = torch.arange(len(weight))[:, None].expand(weight.shape)
            rows = torch.cat([each[..., 0].reshape(-1) for each in layout_of(weight).rows_by_rule(numbered, SCALAR)])
        for group in run.optimizer.param_groups:
            group["lr"] = group["max_lr"]  # as Megatron's scheduler does after the warm-up
        before = weight.detach().clone()
        run.losses(1)
        updates.append((weight.detach() - before)[rows])
    return updates[0], updates[1]


@EACH
def test_rows_under_adam_move_as_in_a_weight_of_adams(pool: RankPool, layout: Layout) -> None:
    for as_rows, as_whole in pool.run(first_updates, layout.tp, layout):
        assert len(as_rows) == 8 // layout.tp and as_whole.abs().max() > 0
        torch.testing.assert_close(as_rows, as_whole, rtol=1e-5, atol=1e-9)  # float32, other order of operations
