"""Each alarm is raised by its own failure and by nothing else, once, and by nothing that a healthy run does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from megatron_muon.config import MuonConfig, flag
from megatron_muon.monitor.alarms import ALARMS, Alarm, Alarms, Thresholds
from megatron_muon.monitor.schema import STATS
from megatron_muon.monitor.table import Row, Table

HEALTHY = {
    "gradient_norm": 0.1,
    "zero_gradient": 0.0,
    "momentum_norm": 0.1,
    "at_bound": 0.0,
    "stable_rank": 8.0,
    "unlifted": 0.05,
    "defect": 0.3,
    "largest_singular": 1.2,
    "update_rms": 2e-5,
    "weight_rms": 0.02,
    "update_ratio": 1e-3,
    "cosine": 0.8,
    "spectral_norm": 1.0,
    "nonfinite": 0.0,
}
FC1, FC2 = "decoder.layers.{}.mlp.linear_fc1.weight[gate]", "decoder.layers.{}.mlp.linear_fc2.weight"
EXPERT = "decoder.layers.{}.mlp.experts.linear_fc1.weight3[up]"
ROUTER = "decoder.layers.{}.mlp.router.weight"
ALL = [each.format(layer) for each in (FC1, FC2, EXPERT, ROUTER) for layer in range(8)]
DEAD = {"gradient_norm": 0.0, "zero_gradient": 1.0}
SHRUNK = {"momentum_norm": 1e-9, "at_bound": 1.0, "unlifted": 1.0, "defect": 0.99, "update_ratio": 1e-9}
FLAT = {"unlifted": 0.95}
NAN = {name: math.nan for name in STATS} | {"nonfinite": 1.0, "zero_gradient": 0.0, "at_bound": 0.0}


def row(changes: dict[str, float] | None = None, matrices: int = 1) -> Row:
    numbers = HEALTHY | (changes or {})
    return Row(matrices, {name: (value, value, value) for name, value in numbers.items() if not math.isnan(value)})


def table(number: int, sick: dict[str, dict[str, float]] | None = None, logit: float | None = 5.0) -> Table:
    """The measured step ``number``, ten iterations after the one before."""
    rows = {name: row((sick or {}).get(name)) for name in ALL}
    return Table(10 * number, rows, rates={"lr": 0.02}, max_attention_logit=logit)


def raised(steps: int, make: Callable[[int], Table], alarms: Alarms | None = None) -> list[Alarm]:
    alarms = alarms or Alarms()
    return [alarm for number in range(1, steps + 1) for alarm in alarms.examine(make(number))]


WEIGHT, ROUTED = FC1.format(3), EXPERT.format(5)
FAILURES: dict[str, tuple[str, str, dict[str, float]]] = {
    "NaN in momentum": ("nonfinite", WEIGHT, NAN),
    "no tokens": ("dead_experts", ROUTED, DEAD),
    "no tokens, and the momentum has faded": ("dead_experts", ROUTED, DEAD | SHRUNK),
    "a router that always chooses the same": ("dead_experts", ROUTER.format(5), DEAD),
    "not reached by the loss": ("no_gradient", WEIGHT, DEAD),
    "eps too large": ("norm_at_bound", WEIGHT, SHRUNK),
    "gradients of rank 1": ("rank_collapse", WEIGHT, {"stable_rank": 1.0, "unlifted": 63 / 64, "defect": 0.99}),
    "products too coarse": ("defect", WEIGHT, {"defect": 0.6}),
    "coefficients that diverge": ("defect", WEIGHT, {"largest_singular": 3.0}),
    "a rate a thousand times too high": ("update_ratio", WEIGHT, {"update_ratio": 50.0}),
    "a rate too high": ("update_ratio", WEIGHT, {"update_ratio": 0.8}),
    "a rate of nothing": ("update_ratio", WEIGHT, {"update_ratio": 1e-9}),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_raises_its_alarm_and_no_other(failure: str) -> None:
    name, weight, changes = FAILURES[failure]
    found = raised(20, lambda number: table(number, {weight: changes} if number > 5 else {}))
    assert [(alarm.name, alarm.weights, alarm.count) for alarm in found] == [(name, (weight,), 1)]
    assert found[0].since == 60
    assert found[0].iteration in (60, 90)
    assert weight in found[0].text
    assert "Usual cause: " in found[0].text


def test_logits_that_grow_geometrically() -> None:
    found = raised(20, lambda number: table(number, logit=1.2**number * 8))
    assert [alarm.name for alarm in found] == ["logits_growing"]
    assert found[0].value > 100
    for logits in (lambda n: 1.2**n, lambda n: 100.0 + 2 * n, lambda n: 900.0 - n, lambda n: 150.0 + 60 * (n % 4)):
        assert raised(20, lambda number, logits=logits: table(number, logit=logits(number))) == []


def test_replicas_are_told_once() -> None:
    alarms, differing = Alarms(), [f"weight{number}: exp_avg (rank 3 of 0, 1, 2, 3)" for number in range(6)]
    (alarm,) = alarms.compare(100, differing)
    assert (alarm.name, alarm.count, alarm.since) == ("replicas_differ", 6, 100)
    assert "weight0: exp_avg (rank 3 of 0, 1, 2, 3)" in alarm.text
    assert "and 2 more" in alarm.text
    assert alarms.compare(200, differing) == []
    assert [each.count for each in alarms.compare(300, [*differing, "another"])] == [1]
    assert alarms.compare(400, []) == []
    assert len(alarms.compare(500, differing)) == 1


def zeros_at_first(number: int) -> dict[str, float]:
    """A weight of zeros that grows by one step's size in each of the ten steps between two tables."""
    before = 10 * number - 10
    ratio = {"update_ratio": 1 / before if before else math.inf, "weight_rms": before * 1e-4}
    return ratio | ({"zero_gradient": 1.0} if number == 1 else {})


def scheduled(number: int, rate: float) -> Table:
    """With a learning rate; at 0.02 the update is a thousandth of the weight."""
    rows = {name: row({"update_ratio": rate / 20}) for name in ALL}
    return Table(100 * number, rows, rates={"lr": rate})


UNALARMING: dict[str, Callable[[int], Table]] = {
    "a healthy run": lambda number: table(number),
    "a rate of zero for some weights": lambda number: table(number, {WEIGHT: {"update_rms": 0.0, "update_ratio": 0.0}}),
    "weights of zeros": lambda number: table(number, dict.fromkeys(ALL, zeros_at_first(number))),
    "an expert without tokens now and then": lambda number: table(number, {ROUTED: DEAD} if number % 4 else {}),
    "a warm-up from nothing": lambda number: scheduled(number, 5e-7 * (number - 1)),
    "a decay to nothing": lambda number: scheduled(number, 2e-2 * (20 - number) ** 4 / 20**4),
    "nothing measured": lambda number: Table(number, {name: Row(1, {}) for name in ALL}),
    "few directions at first": lambda number: table(number, {WEIGHT: {"unlifted": 0.97}} if number < 4 else {}),
    "some experts of a weight of many": lambda number: table(
        number, {ROUTED: {"zero_gradient": 0.25, "at_bound": 0.2}}
    ),
}


@pytest.mark.parametrize("name", UNALARMING)
def test_what_healthy_runs_do_is_no_alarm(name: str) -> None:
    assert raised(20, UNALARMING[name]) == []


def test_what_has_ended_is_told_again() -> None:
    limit = Thresholds().in_a_row

    def sick(number: int) -> bool:
        return number % 15 < 8

    found = raised(30, lambda number: table(number, {WEIGHT: SHRUNK} if sick(number) else {}))
    assert [alarm.since for alarm in found] == [10, 150, 300][: len(found)]
    assert len(found) == 2
    # Out of range in most steps, and now and then not for a step: it is one.
    most = raised(40, lambda number: table(number, {WEIGHT: SHRUNK} if number % (limit + 1) else {}))
    assert [alarm.since for alarm in most] == [10]


def test_weights_are_grouped_and_more_are_told_when_they_are_twice_as_many() -> None:
    experts = [EXPERT.format(layer) for layer in range(8)]
    found = raised(20, lambda number: table(number, dict.fromkeys(experts[: max(0, number - 3)], DEAD)))
    assert [alarm.count for alarm in found] == [1, 2, 4, 8]
    assert found[-1].weights == tuple(experts[:4])
    assert "8 of decoder.layers.*.mlp.experts.linear_fc1.weight*[up] (" in found[-1].text
    assert "and 4 more)" in found[-1].text
    assert {alarm.since for alarm in found} == {40}


def test_first_gradients_and_those_of_a_warmup_may_have_few_directions() -> None:
    def warming_up(number: int) -> Table:
        return replace(table(number, {WEIGHT: FLAT}), rates={"lr": 0.001 * min(number, 12)})

    (alarm,) = raised(17, warming_up)
    assert (alarm.name, alarm.since, alarm.iteration) == ("rank_collapse", 130, 160)
    assert raised(5, lambda number: table(number, {WEIGHT: FLAT})) == []


def test_several_classes_are_one_alarm() -> None:
    (alarm,) = raised(6, lambda number: table(number, dict.fromkeys([*ALL[:2], *ALL[8:10]], FLAT)))
    assert alarm.count == 4
    assert "--muon-param-rule 'decoder.layers.*.mlp.linear_fc1.weight=steps:7'" in alarm.text


def test_the_coefficients_defect_counts() -> None:
    defects = dict.fromkeys(ALL, 0.5)
    assert raised(6, lambda number: table(number, {WEIGHT: {"defect": 0.6}}), Alarms(defects=defects)) == []


def test_thresholds_are_the_users() -> None:
    alarms = Alarms(Thresholds(in_a_row=1, unlifted=0.04))
    assert {alarm.name for number in (1, 3) for alarm in alarms.examine(table(number))} == {"rank_collapse"}
    with pytest.raises(ValueError, match="threshold unlifted is 0"):
        Alarms(Thresholds(unlifted=0))
    assert all(each.metadata["reason"] and each.metadata["source"] for each in fields(Thresholds))


def test_flags_to_try_are_there() -> None:
    own: set[str] = {flag(each.name) for each in fields(MuonConfig)}
    words = " ".join(f"{kind.remedy} {kind.cause} {kind.meaning}" for kind in ALARMS.values()).split()
    assert {word.strip(",.;()'") for word in words if word.startswith("--muon-")} <= own
