"""Budgets of weights: what rules say of steps and coefficients, and that each matrix gets what its weight has."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_muon import ConfigError, Muon, MuonConfig, SpectralSphere, param_groups
from megatron_muon.checkpoint.param_state import ParamState
from megatron_muon.engine.balance import cost_of_weight
from megatron_muon.engine.choose import choose_plan
from megatron_muon.engine.lending import lend
from megatron_muon.engine.modes import AUTO, DISTRIBUTED, GRAM, OWNER, Machine, Sizes
from megatron_muon.engine.plan import Peers, Plan, Weight
from megatron_muon.engine.planner import Policy, make_plan
from megatron_muon.engine.prediction import predict
from megatron_muon.orthogonalize import Orthogonalizer
from megatron_muon.orthogonalize.products import TorchProducts
from megatron_muon.routing import annotate
from megatron_muon.routing.layout import SIGN, WHOLE, Budget, MatrixLayout, Section, layout_of
from megatron_muon.routing.partition import refuse_unmatched

SEVEN, EXPRESS, BOTH = Budget(7), Budget(coefficients="polar_express"), Budget(3, "polar_express")
CANS = Budget(coefficients="cans")
QKV = MatrixLayout("qkv", (Section("q", 8), Section("k", 4), Section("v", 4)))
OPTIONS = MuonConfig()
FLOAT32 = Orthogonalizer(OPTIONS.iteration(), torch.float32, budgeted=OPTIONS.iteration)
FLOAT16 = Orthogonalizer(OPTIONS.iteration(), torch.float16, budgeted=OPTIONS.iteration)
SIZES = Sizes(4, 4, 4)
FREE = Policy(AUTO, SIZES, 1 << 28, Machine(1e11, 1e20, 0.0))
"""Messages cost nothing."""


def small_model() -> torch.nn.Module:
    """Names: 0.weight, 0.bias, 1.weight, 2.weight (a table), 3.weight (a single row)."""
    layers = [torch.nn.Linear(8, 6), torch.nn.Linear(6, 8, bias=False), torch.nn.Embedding(5, 8)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(8, 1, bias=False))


def budgets_by(*rules: str) -> dict[str, Budget | None]:
    model = small_model()
    refuse_unmatched(MuonConfig(param_rule=rules).validate(), annotate(model, MuonConfig(param_rule=rules)))
    return {name: layout_of(param).budget for name, param in model.named_parameters() if layout_of(param).budget}


# Rules.


@pytest.mark.parametrize(
    "rules,expected",
    [
        pytest.param(["0.weight=steps:7"], {"0.weight": SEVEN}, id="steps"),
        pytest.param(["1.*=coefficients:polar_express"], {"1.weight": EXPRESS}, id="coefficients"),
        pytest.param(["*=steps:7"], {"0.weight": SEVEN, "1.weight": SEVEN}, id="of what is orthogonalized alone"),
        pytest.param(["*=steps:9", "0.*=steps:7", "1.*=steps:7"], {"0.weight": SEVEN, "1.weight": SEVEN}, id="last"),
        pytest.param(
            ["0.*=steps:3", "*=coefficients:polar_express"], {"0.weight": BOTH, "1.weight": EXPRESS}, id="both"
        ),
        pytest.param(["0.*=steps:7", "*.weight=whole", "[123].*=adam"], {"0.weight": SEVEN}, id="beside others"),
        pytest.param(
            ["*=steps:7", "0.weight=sign", "2.*=muon"], {"1.weight": SEVEN, "2.weight": SEVEN}, id="not of balls"
        ),
    ],
)
def test_the_last_rule_of_each_kind_decides(rules: list[str], expected: dict[str, Budget]) -> None:
    assert budgets_by(*rules) == expected


@pytest.mark.parametrize("rule", ["2.weight=steps:7", "0.bias=coefficients:simple", "3.*=steps:2", "7.*=steps:2"])
def test_a_rule_for_nothing_that_is_orthogonalized_is_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"--muon-param-rule '{rule}': no weight of such a name is orthogonalized"):
        budgets_by("0.weight=steps:9", rule)


def test_rules_that_are_gone_leave_no_budget() -> None:
    model = small_model()
    annotate(model, MuonConfig(param_rule=("*=steps:7",)))
    annotate(model, MuonConfig())
    assert all(layout_of(param).budget is None for param in model.parameters())


@pytest.mark.parametrize(
    "rule,message",
    [
        ("*=steps:0", r"'\*=steps:0': give a whole number of at least 1, such as steps:7"),
        ("*=steps:2.5", r"'\*=steps:2\.5': give a whole number"),
        ("*=steps:-1", r"'\*=steps:-1': give a whole number"),
        ("*=steps:", r"'\*=steps:': give a whole number"),
        ("*=steps:\N{SUPERSCRIPT TWO}", "give a whole number"),
        ("*=coefficients:jordan", r"'\*=coefficients:jordan': choose one of simple, quintic"),
        ("*=coefficients:", r"'\*=coefficients:': choose one of"),
        ("*=step:7", r"'\*=step:7' is not GLOB=CHOICE with a choice of .*, steps:N, steps:auto, coefficients:NAME"),
        ("=steps:7", "'=steps:7' is not GLOB=CHOICE"),
        ("*=coefficients:custom", "'.*=coefficients:custom' with --muon-coefficient-type quintic: --muon-custom-coef"),
    ],
)
def test_wrong_rules_are_refused(rule: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--muon-param-rule .*{message}"):
        MuonConfig(param_rule=("0.*=adam", rule)).validate()


def test_custom_coefficients_of_some() -> None:
    rules = ("*=coefficients:quintic", "0.weight=coefficients:custom")
    custom = MuonConfig(param_rule=rules, coefficient_type="custom", custom_coefficients=("2,-1.5,0.5",)).validate()
    assert custom.iteration(Budget(2, "custom")).coefficients == ((2.0, -1.5, 0.5),) * 2
    assert custom.iteration(Budget(coefficients="quintic")) == OPTIONS.iteration()
    assert custom.iteration(SEVEN).coefficients == ((2.0, -1.5, 0.5),) * 7


def test_budgets_are_told() -> None:
    groups = param_groups(small_model(), MuonConfig(param_rule=("3.*=adam", "0.*=steps:7", "*=coefficients:simple")))
    table = groups.table.splitlines()
    assert any(line.split()[0] == "0.weight" and "whole 6 x 8 (7 steps, simple)" in line for line in table)
    assert any(line.split()[0] == "1.weight" and "whole 8 x 6 (simple)" in line for line in table)
    assert "param_rule 0.*=steps:7: 1 weights" in table
    assert "param_rule *=coefficients:simple: 2 weights" in table
    engine = Muon(groups.muon, ns_dtype="fp32").prepare()
    assert engine is not None
    assert "1 standard Newton-Schulz, float32 (7 steps, simple)" in engine.describe()[1]


# Numbers.


def weight(shape: tuple[int, ...], layout: MatrixLayout, budget: Budget | None, seed: int) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))
    param.matrix_layout = replace(layout, budget=budget)  # type: ignore[attr-defined]
    return param


SHAPES = [((12, 20), WHOLE)] * 4 + [((32, 12), QKV), ((3, 8, 12), WHOLE.stack()), ((40, 8), WHOLE)]


@pytest.mark.parametrize(
    "variant", ["none", "polargrad", SpectralSphere(tolerance=0.5)], ids=["none", "polar", "sphere"]
)
@pytest.mark.parametrize("ns_dtype", ["fp32", "bf16"])
def test_each_weight_steps_as_if_alone(variant: object, ns_dtype: str) -> None:
    """Bit by bit, beside others of its shape with other budgets."""
    kinds = (None, SEVEN, EXPRESS, BOTH)

    def params() -> list[torch.nn.Parameter]:
        return [weight(*given, kinds[seed % 4], seed) for seed, given in enumerate(SHAPES)]

    options = {"ns_dtype": ns_dtype, "ns_backend": "torch"}
    together = params()
    Muon(together, variant=variant, **options).step()  # type: ignore[arg-type]
    for number, param in enumerate(params()):
        budget = layout_of(param).budget or Budget()
        param.matrix_layout = replace(layout_of(param), budget=None)  # type: ignore[attr-defined]
        own = {"num_ns_steps": budget.steps or 5, "coefficient_type": budget.coefficients or "quintic"}
        Muon([param], variant=copy.copy(variant), **own, **options).step()  # type: ignore[arg-type]
        assert torch.equal(param, together[number]), number


def test_a_changed_budget_is_planned_anew() -> None:
    param = weight((12, 20), WHOLE, None, 0)
    muon = Muon([param])
    first = muon.prepare()
    assert muon.prepare() is first
    param.matrix_layout = replace(WHOLE, budget=SEVEN)  # type: ignore[attr-defined]
    second = muon.prepare()
    assert first is not None and second is not None and second is not first
    assert second.plan.chunks[0].budget == SEVEN and second.digest("") != first.digest("")


def test_kernels_that_are_put_in_place_later_are_those_of_all_budgets() -> None:
    iteration = Orthogonalizer(OPTIONS.iteration(), torch.float32, budgeted=OPTIONS.iteration)
    before = iteration.of(SEVEN)
    assert iteration.of(SEVEN) is before and iteration.of(None) is iteration
    copied = copy.copy(iteration)
    copied.products = iteration.products = TorchProducts()
    assert iteration.of(SEVEN).products is iteration.products is not before.products
    assert copied.of(SEVEN) is not iteration.of(SEVEN) and copied.of(SEVEN).iteration == before.iteration


# Options of param groups.


@pytest.mark.parametrize(
    "name,value,kind", [("num_ns_steps", 7, "steps"), ("coefficient_type", "simple", "coefficients")]
)
def test_param_groups_have_budgets_by_rules_alone(name: str, value: object, kind: str) -> None:
    message = rf"^{name} in a param group: .* a rule of MuonConfig\(param_rule=\('GLOB={kind}:\.\.\.',\)\)"
    param = weight((4, 6), WHOLE, None, 0)
    with pytest.raises(ConfigError, match=message):
        Muon([{"params": [param], name: value}])
    muon = Muon([param])
    muon.param_groups[0][name] = value
    before = param.detach().clone()
    with pytest.raises(ConfigError, match=message):
        muon.step()
    assert torch.equal(param, before)


def test_layouts_made_by_hand_are_checked() -> None:
    with pytest.raises(ValueError, match="coefficient_type 'jordan': choose one of"):
        Muon([weight((4, 6), WHOLE, Budget(coefficients="jordan"), 0)])
    with pytest.raises(ConfigError, match="a budget of 7 steps for a weight of 4 x 6 by sign: what is not orthogonali"):
        Muon([weight((4, 6), replace(WHOLE, direction=SIGN), SEVEN, 0)])


# What it costs, and who does it.


def test_owners_of_weights_know_of_budgets() -> None:
    plain, costly = (weight((64, 96), WHOLE, budget, 0) for budget in (None, Budget(10)))
    assert cost_of_weight(costly, None, OPTIONS.iteration) == 2 * cost_of_weight(plain, None, OPTIONS.iteration)


def divided(budget: Budget | None, ranks: int = 2, shape: tuple[int, int] = (64, 256)) -> Weight:
    return Weight((shape[0], shape[1] // ranks), replace(WHOLE, budget=budget), -1, "tp", ranks)


def flops_of(plan: Plan, iteration: Orthogonalizer, ranks: int) -> list[float]:
    return [predict(plan, iteration, SIZES, {"tp": rank}).flops for rank in range(ranks)]


def test_owners_of_matrices_share_operations_not_matrices() -> None:
    """One rank does the matrix of seven steps, the other those of five and of two."""
    bf16 = Orthogonalizer(OPTIONS.iteration(), torch.bfloat16, budgeted=OPTIONS.iteration)
    plan = make_plan([divided(budget) for budget in (Budget(2), None, SEVEN)], replace(FREE, mode=OWNER), bf16)
    assert flops_of(plan, bf16, 2) == [bf16.of(SEVEN).flops(64, 256)] * 2
    plan = make_plan([*[divided(None, 4)] * 3, *[divided(Budget(15), 4)] * 3], replace(FREE, mode=OWNER), bf16)
    assert flops_of(plan, bf16, 4) == [bf16.of(Budget(15)).flops(64, 256)] * 4, "one rank has all three"
    assert len(plan.chunks) == 1, "both in one message"


@pytest.mark.parametrize("mode", [GRAM, DISTRIBUTED])
def test_ranks_that_meet_in_each_step_have_one_budget_in_a_chunk(mode: str) -> None:
    weights = [divided(budget, shape=shape) for shape in ((64, 256), (32, 256)) for budget in (None, SEVEN, EXPRESS)]
    plan = make_plan(weights, replace(FREE, mode=mode), FLOAT32)
    assert [len(chunk.batches) for chunk in plan.chunks] == [2, 2, 2]
    assert all(batch.key.budget == chunk.budget for chunk in plan.chunks for batch in chunk.batches)
    assert {chunk.budget for chunk in plan.chunks} == {None, SEVEN, EXPRESS}


def test_gram_is_for_the_sets_that_it_is_accurate_for() -> None:
    """In float16 it is so of quintic, and not of cans."""
    assert FLOAT16.restarts is not None and FLOAT16.of(CANS).restarts is None
    weights, slow = [divided(None), divided(CANS)], Machine(1e16, 1e3, 0.0)
    plan = make_plan(weights, replace(FREE, mode=GRAM), FLOAT16)
    assert {chunk.budget: chunk.mode for chunk in plan.chunks} == {None: GRAM, CANS: OWNER}
    chosen = choose_plan(
        [divided(each) for each in (None, CANS) for _ in range(2)], replace(FREE, machine=slow), FLOAT16
    )
    assert {chunk.budget: chunk.mode for chunk in chosen.chunks}[None] == GRAM, "the fewest bytes"
    assert all(chunk.mode != GRAM for chunk in chosen.chunks if chunk.budget == CANS)


def test_gram_by_name_is_refused_for_one_budget() -> None:
    param = weight((8, 12), WHOLE, CANS, 0)
    with pytest.raises(ConfigError, match=r"^tp_mode gram: .* in torch.float16 with a param_rule of cans"):
        Muon([param], tp_mode="gram", ns_dtype="fp16").prepare()


def test_busy_ranks_lend_by_operations() -> None:
    """The first of two ranks holds three matrices of five steps, the second three of fifteen."""
    peers = [Peers("data", 2, holder) for holder in (0, 0, 0, 1, 1, 1)]
    weights = [Weight((64, 256), replace(WHOLE, budget=Budget(15) if its.holder else None), peers=its) for its in peers]
    before, after = lend(tuple(weights), FREE, FLOAT32).flops["data"]
    assert before[1] > 2.5 * before[0] and max(after) < 1.15 * min(after)
    plans = [choose_plan(weights, FREE, FLOAT32, {"data": rank}) for rank in range(2)]
    assert [predict(plan, FLOAT32, SIZES, {"data": rank}).flops for rank, plan in enumerate(plans)] == after
    assert len({plan.digest("data") for plan in plans}) == 1


# Checkpoints.


def test_records_have_the_numbers_of_each_weight() -> None:
    params = [weight((4, 6), WHOLE, budget, 0) for budget in (None, SEVEN, EXPRESS)]
    muon = Muon(params)
    held = [ParamState(param, muon, muon.param_groups[0], param, None) for param in params]
    numbers = [(each.numbers["num_ns_steps"], each.numbers["coefficient_type"]) for each in held]
    assert numbers == [(5, "quintic"), (7, "quintic"), (5, "polar_express")]
    adam = SimpleNamespace()
    assert "num_ns_steps" not in ParamState(params[1], adam, {}, params[1], None).numbers  # type: ignore[arg-type]
