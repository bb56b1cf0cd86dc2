"""What Megatron logs of a step - norms of weights and gradients, zeros in gradients - does not depend on the layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_layer_wise_balance import arguments
from tests.megatron.test_nothing_to_own import start
from tests.megatron.test_routing import MOE
from tests.pool import RankPool

DENSE: dict[str, Any] = {}
TIED = {"tied": True}
STARVED = {**MOE, "num_moe_experts": 16, "moe_router_topk": 1, "moe_router_pre_softmax": True}
"""Of so many experts some get no token: all of their gradients are zero, on whichever rank they are."""
MODELS = {"dense": DENSE, "tied": TIED, "experts": STARVED}


@dataclass(frozen=True)
class Numbers:
    """Of one step, as Megatron's training loop gets them."""

    weights: float
    gradients: float
    zeros: int


def numbers(cases: list[tuple[str, Layout, dict[str, Any]]], weights: dict[str, str]) -> list[list[Numbers]]:
    """Runs on a rank: those of two steps of each case, taken right after the step."""
    return [_numbers(weights[model], layout, {**MODELS[model], **options}) for model, layout, options in cases]


def _numbers(weights: str, layout: Layout, options: dict[str, Any]) -> list[Numbers]:
    run = start(layout, ["*"], weights, optimizer={"log_num_zeros_in_grad": True}, **options)
    from megatron.training.training import calc_params_l2_norm

    found, step = [], run.optimizer.step

    def step_and_log() -> Any:
        result = step()
        found.append(Numbers(calc_params_l2_norm(run.chunks), float(result[1]), result[2]))
        return result

    run.optimizer.step = step_and_log
    with arguments(use_megatron_fsdp=False, bf16=options.get("bf16", False), optimizer="muon"):
        run.losses(2)
    return found


class Models:
    """Initial weights and the numbers of one process, made when a case asks for them."""

    def __init__(self, pool: RankPool, folder: Path) -> None:
        self._pool, self._folder = pool, folder
        self._expected: dict[str, list[Numbers]] = {}

    def weights(self, name: str) -> str:
        """The folder of a checkpoint."""
        folder = self._folder / name
        if not folder.exists():
            self._pool.run(harness.save_initial_weights, 1, str(folder), **MODELS[name])
        return str(folder)

    def expected(self, name: str) -> list[Numbers]:
        """Of two steps in float32."""
        if name not in self._expected:
            weights = {name: self.weights(name)}
            self._expected[name] = self._pool.run(numbers, 1, [(name, Layout(), {})], weights)[0][0]
        return self._expected[name]


@pytest.fixture(scope="module")
def models(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(pool, tmp_path_factory.mktemp("weights"))


LAYOUTS = {
    "DP 2": (2, Layout(), ("dense", "experts")),
    "TP 2": (2, Layout(tp=2), ("dense", "tied")),
    "TP 2, sequences": (2, Layout(tp=2, sp=True), ("dense", "experts")),
    "TP 2, experts whole": (2, Layout(tp=2, etp=1, sp=True), ("experts",)),
    "PP 2": (2, Layout(pp=2), ("dense", "tied")),
    "EP 2": (2, Layout(ep=2), ("experts",)),
    "CP 2": (2, Layout(cp=2), ("dense",)),
    "TP 2 x DP 2": (4, Layout(tp=2), ("dense",)),
    "PP 2 x DP 2": (4, Layout(pp=2), ("dense", "tied")),
    "PP 2 x DP 2, virtual": (4, Layout(pp=2, vpp=2), ("dense",)),
    "EP 2 x DP 2": (4, Layout(ep=2), ("experts",)),
    "TP 2 x EP 2, experts whole": (4, Layout(tp=2, ep=2, etp=1, sp=True), ("experts",)),
    "TP 2 x DP 2, experts whole": (4, Layout(tp=2, etp=1, sp=True), ("experts",)),
}
PLAIN: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    PLAIN,
    ({"layer_wise": True}, {}),
    ({"layer_wise": True}, {"param_layout": False}),
    ({"layer_wise": True, "overlap": False}, {}),
    ({"layer_wise": True, "overlap": False}, {"param_layout": False}),
]
"""Changes to the layout, options of ``start``."""
ALL = [(form, bf16) for bf16 in (False, True) for form in FORMS]
QUICK = {"TP 2 x DP 2, experts whole": [(FORMS[1], False), (FORMS[4], False), (PLAIN, True), (FORMS[1], True)]}


@pytest.mark.parametrize("name", QUICK)
def test_numbers_do_not_depend_on_the_layout(pool: RankPool, models: Models, name: str) -> None:
    check(pool, models, name, QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_numbers_do_not_depend_on_the_layout_in_any_form(pool: RankPool, models: Models, name: str) -> None:
    check(pool, models, name, ALL)


def check(pool: RankPool, models: Models, name: str, forms: list[Any]) -> None:
    """Float32: one process's. In bfloat16, where gradients differ by layout, layer-wise those of the plain form."""
    world, layout, names = LAYOUTS[name]
    cases = [
        (model, replace(layout, **changes), {**options, "bf16": bf16})
        for model in names
        for (changes, options), bf16 in forms
    ]
    by_rank = pool.run(numbers, world, cases, {model: models.weights(model) for model in names})
    for rank in by_rank:
        assert rank == by_rank[0]
    plain: dict[str, list[Numbers]] = {}
    for (model, form, options), found in zip(cases, by_rank[0], strict=True):
        if options["bf16"] and not form.layer_wise:
            plain[model] = found
        # Rounding to bfloat16 makes gradients of the second step differ: weights differ in their last bits by then.
        known = plain[model][:1] if options["bf16"] else models.expected(model)
        for one, other in zip(found, known, strict=False):
            assert one.weights == pytest.approx(other.weights, rel=1e-6), (model, form, options)
            assert one.gradients == pytest.approx(other.gradients, rel=1e-6), (model, form, options)
            assert one.zeros == other.zeros, (model, form, options)
    if "experts" in names:
        unused = models.expected("experts")[0].zeros - 64 * 32  # or fewer are of the embedding's rows
        assert unused >= 24 * 32 * 3, "an expert without tokens, or this says nothing about experts"
