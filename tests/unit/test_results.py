"""Arithmetic, text and pages of ``tools/results``."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_muon.orthogonalize import Iteration, Orthogonalizer
from tools.results import (
    arithmetic,
    coordinates,
    corpus,
    momentum,
    momentum_dtype,
    moonlight,
    report,
    rounding,
    sets,
    sphere,
    stiefel,
    transfer,
)
from tools.results.__main__ import parse_arguments
from tools.results.model import HEAD, Setting
from tools.results.records import AlarmError, Context, Record, Sweep, to_json


def parabola(lowest: float, rates: list[float]) -> dict[float, float]:
    return {rate: 1.0 + 0.3 * (math.log2(rate) - math.log2(lowest)) ** 2 for rate in rates}


GRID = [2.0**exponent for exponent in range(-8, -3)]


@pytest.mark.parametrize("lowest", [2**-6.4, 2**-6, 2**-5.7])
def test_the_lowest_point_of_a_parabola_is_found_between_rates(lowest: float) -> None:
    losses = parabola(lowest, GRID)
    assert arithmetic.interpolated(losses) == pytest.approx(lowest)
    assert arithmetic.best(losses) == 2**-6
    assert arithmetic.is_at_end(losses) == 0


def test_there_is_no_parabola_at_an_end_or_beside_a_run_that_diverged() -> None:
    rising = {1.0: 2.0, 2.0: 3.0, 4.0: 4.0}
    assert arithmetic.interpolated(rising) is None and arithmetic.is_at_end(rising) == -1
    assert arithmetic.optimum(rising) == 1.0
    falling = {1.0: 3.0, 2.0: 2.0, 4.0: 1.0}
    assert arithmetic.interpolated(falling) is None and arithmetic.is_at_end(falling) == 1
    assert arithmetic.interpolated({1.0: 2.0, 2.0: 1.0, 4.0: math.inf}) is None
    assert arithmetic.interpolated({1.0: 2.0, 2.0: 2.0, 4.0: 2.0}) is None


def test_runs_that_diverged_are_never_the_best() -> None:
    assert arithmetic.best({1.0: math.inf, 2.0: 3.0}) == 2.0
    with pytest.raises(ValueError, match="every run diverged"):
        arithmetic.best({1.0: math.inf})


def test_cells_and_slopes() -> None:
    assert arithmetic.cells(0.04, 0.01) == 2.0
    widths = [64, 128, 256, 512]
    assert arithmetic.slope(widths, [3 * width**-0.5 for width in widths]) == pytest.approx(-0.5)
    assert arithmetic.slope(widths, [2.0] * 4) == 0.0


def test_shifts_are_counted_from_the_smallest_width() -> None:
    losses = {64: parabola(2**-6.2, GRID), 128: parabola(2**-5.1, GRID)}
    assert transfer.shifts(losses)[128] == pytest.approx({"grid": 1.0, "interpolated": 1.1})
    assert "+1 (+1.10 interpolated) at width 128" in transfer.findings("rule", losses)[0]


def test_findings_say_where_the_grid_ends() -> None:
    losses = {64: parabola(2**-6, GRID), 128: parabola(2**-2, GRID)}
    assert "at width 128 it is at the end of what was tried" in transfer.findings("rule", losses)[0]


def test_the_table_marks_the_best_and_what_diverged() -> None:
    lines = report.loss_table("width", {"64": {0.5: 2.0, 1.0: 1.5, 2.0: math.inf}}).splitlines()
    assert lines[2] == "| 64 | 2.0000 | **1.5000** | diverged | 1 | at the end |"


def test_rare_characters_share_a_number() -> None:
    numbers = corpus.number_characters("a" * 50 + "b" * 30 + "c")
    assert numbers == {"a": 1, "b": 2}


def test_batches_follow_from_the_step_and_validation_covers_its_text() -> None:
    data = corpus.load()
    assert int(data.train.max()) < corpus.VOCABULARY and len(data.valid) > 100_000
    first, again, other = (data.batch(step, 1, 2, 16) for step in (0, 0, 1))
    assert first["tokens"].equal(again["tokens"]) and not first["tokens"].equal(other["tokens"])
    assert first["tokens"][:, 1:].equal(first["labels"][:, :-1])
    pieces = [data.valid_batch(number, 3, 2, 16)["tokens"] for number in range(3)]
    assert len({tuple(row) for piece in pieces for row in piece.tolist()}) == 6


def record(loss: float) -> Record:
    return Record(loss, loss + 0.1, [3.0, loss], 0.2, 0.1, {})


def test_a_sweep_is_the_mean_over_seeds_and_grows_to_the_side_of_its_best(tmp_path: Path) -> None:
    class Counted(Context):
        def record(self, setting: Setting, watch: object = None) -> Record:
            return record(abs(math.log2(setting.rate) + 2) + 0.01 * (setting.seed - self.seed))

    sweep = Counted(tmp_path, seeds=2).sweep(Setting(64, 2, "adam", 0.0), [2**-6, 2**-5, 2**-4])
    assert list(sweep.records) == [2**-6, 2**-5, 2**-4, 2**-3, 2**-2]
    assert sweep.best == 2**-2 and sweep.best_loss == pytest.approx(0.005)
    json.dumps(sweep.as_json())


def test_an_alarm_at_the_best_rate_ends_the_command_and_none_at_the_end_of_a_sweep(tmp_path: Path) -> None:
    class Alarmed(Context):
        def record(self, setting: Setting, watch: object = None) -> Record:
            has = self.seed == 7 or setting.rate == 4.0
            return replace(record(abs(math.log2(setting.rate))), alarms=["ALARM defect"] if has else [])

    setting = Setting(64, 2, "muon", 4.0)
    assert Alarmed(tmp_path).sweep(setting, [0.5, 1.0, 4.0]).best == 1.0
    with pytest.raises(AlarmError, match="muon 64x2 rate 1 seed 1234: ALARM defect"):
        Alarmed(tmp_path, seed=7).sweep(setting, [0.5, 1.0, 4.0])
    with pytest.raises(AlarmError, match="rate 4 seed"):
        Alarmed(tmp_path).records(setting)


def test_a_record_is_made_once(tmp_path: Path) -> None:
    calls = []

    def make() -> dict[str, object]:
        calls.append(1)
        return {"loss": math.inf}

    context = Context(tmp_path)
    assert [context.cached({"rate": 1}, make) for _ in range(2)] == [{"loss": None}] * 2
    assert len(calls) == 1
    replace(context, fresh=True).cached({"rate": 1}, make)
    assert len(calls) == 2
    kept = [context.kept({"rate": 2}, lambda: {"x": torch.full((2,), float(len(make())))}) for _ in range(2)]
    assert kept[0]["x"].equal(torch.ones(2)) and kept[1]["x"].equal(torch.ones(2)) and len(calls) == 3


def test_numbers_that_json_lacks_are_null() -> None:
    assert to_json({"a": [math.nan, 1.0], "b": (math.inf,)}) == {"a": [None, 1.0], "b": [None]}


def test_the_command_of_a_page(tmp_path: Path) -> None:
    assert report.command("sphere", Context(tmp_path)) == 'make results ARGS="sphere"'
    words = report.command("sphere", Context(tmp_path, seeds=3, steps=20))
    assert words == 'make results ARGS="sphere --steps 20 --seeds 3"'


def test_a_table_of_one_rate() -> None:
    assert Sweep({0.5: [record(1.0)]}).train_losses == {0.5: 1.1}


def test_chance_is_said_with_its_size_or_as_unknown() -> None:
    one, two = Sweep({0.5: [record(1.0)]}), Sweep({0.5: [record(1.0), record(1.2)]})
    assert "one seed only" in sphere.chance({"a": one, "b": two})
    assert sphere.chance({"a": two}).endswith("at most 0.1414.")
    assert "b: the best loss, 1.1000, is 0.1000 above that of a" in sphere.findings({"a": one, "b": two}, "a")[0]


def test_the_factor_of_updates_is_compared_with_the_best_one() -> None:
    text = " ".join(moonlight.factor_findings({0.1: 2.0, 0.2: 1.75, 0.4: 1.5, 0.8: 3.0}))
    assert "F = 0.4 has the lowest loss, 1.5000, inside of what was tried" in text
    assert "F = 0.2 is 0.2500 above the lowest loss" in text


def test_best_rates_are_compared_with_adams() -> None:
    losses = {title: parabola(2**-6, GRID) for title in moonlight.TITLES.values()}
    losses[moonlight.TITLES["none"]] = parabola(2**-4.9, [*GRID, 2**-3, 2**-2])
    moved = {text.partition(": ")[0]: text for text in moonlight.rate_findings(losses)}
    assert "+0 factors of two" in moved[moonlight.TITLES["moonlight"]]
    assert "+1 factors of two (+1.10 interpolated)" in moved[moonlight.TITLES["none"]]


def test_slopes_are_told_flat_or_not() -> None:
    slopes = {"width": {"middle": 0.01, "last": 0.2, "logits": -0.5}}
    text = coordinates.findings("rule", slopes)[0]
    assert "within 0.05 of none at the half of the layers" in text and "multiplies the change by 0.71" in text


def test_query_key_and_value_rows_of_a_fused_weight() -> None:
    heads, width = 2, 3
    weight = torch.arange(heads * 3 * HEAD * width).view(-1, width)
    query, key, value = stiefel.split(weight)
    assert query[0].equal(weight[0]) and key[0].equal(weight[HEAD]) and value[-1].equal(weight[-1])
    assert query[HEAD].equal(weight[3 * HEAD])


def outcomes(**losses: list[float]) -> dict[str, sets.Outcome]:
    found = {sets.REFERENCE: [5.0, 5.2, 5.4], **losses}
    return {name: sets.Outcome(values, found[sets.REFERENCE]) for name, values in found.items()}


def test_a_set_is_compared_seed_by_seed_and_in_units_of_the_spread() -> None:
    one = outcomes(other=[4.9, 5.3, 5.0])["other"]
    assert one.differences == pytest.approx([-0.1, 0.1, -0.4])
    assert one.spread == pytest.approx(0.20817, rel=1e-4)  # its own, above the 0.2 of the reference
    assert one.ratio == pytest.approx(-0.13333 / 0.20817, rel=1e-4)


def test_the_default_changes_only_for_what_is_better_with_both_models_and_costs_no_more() -> None:
    better, worse = [4.7, 4.9, 5.1], [4.9, 5.1, 5.3]
    found = {
        "gpt": outcomes(cheap=better, dear=better, once=better),
        "hybrid": outcomes(cheap=better, dear=better, once=worse),
    }
    costs = {sets.REFERENCE: 1.0, "cheap": 1.0, "dear": 1.01, "once": 0.5}
    assert sets.winners(found, costs) == ["cheap"]
    assert "would change to one of: cheap." in sets.findings(found, costs)[-1]
    del found["gpt"]["cheap"], found["hybrid"]["cheap"], costs["cheap"]
    text = sets.findings(found, costs)
    assert "the default stays" in text[-1] and "more than the spread: dear (-1.50)." in text[1]


def test_logical_matrices_of_momentum_that_is_saved_for_all_layers() -> None:
    rows = torch.arange(2 * 5 * momentum.HEAD).view(-1, 1).expand(-1, 4)
    parts = dict(momentum.split("decoder.layers.0.self_attention.linear_qkv", rows))
    assert [len(part) for part in parts.values()] == [192, 64, 64] and list(parts) == ["q", "k", "v"]
    assert parts["k"][:, 0].tolist() == [*range(96, 128), *range(256, 288)]
    layers = dict(momentum.layers("decoder.layers.mlp.linear_fc2", torch.zeros(2, 3, 4)))
    assert list(layers) == ["decoder.layers.0.mlp.linear_fc2", "decoder.layers.1.mlp.linear_fc2"]


def test_what_an_iteration_makes_of_a_matrix_is_measured_against_its_polar_factor() -> None:
    matrix = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    halves = Orthogonalizer(Iteration(((0.5, 0.0, 0.0),)), torch.float64)  # singular values 0.3 and 0.4
    found = momentum.quality(halves, [matrix])
    assert found.distance.middle == pytest.approx(math.sqrt((0.7**2 + 0.6**2) / 2))
    assert found.defect.middle == pytest.approx(math.sqrt((0.91**2 + 0.84**2) / 2))
    assert found.size.middle == pytest.approx(0.5 / math.sqrt(2))
    assert momentum.stable_rank(matrix) == pytest.approx(25 / 16) and momentum.smallest(matrix) == pytest.approx(0.6)


def test_rounding_reaches_updates_by_the_spectrum() -> None:
    """Noise as it is; of low rank as much more as small singular values are raised, by int8 more than by bfloat16."""
    zoo = rounding.zoo(32, 128)
    assert all(matrix.dtype == torch.float64 and matrix.shape == (32, 128) for matrix in zoo.values())
    ranks = [int(torch.linalg.matrix_rank(zoo[name], rtol=0.1)) for name in ("rank 1", "rank 10, noise of 1e-2")]
    assert ranks == [1, 10]
    noise, low = rounding.errors(zoo["noise"]), rounding.errors(zoo["rank 10, noise of 1e-2"])
    assert noise.kept["fp32"] < 1e-7 < 1e-3 < noise.kept["bf16"] < 2**-9 < noise.kept["int8"] < 1e-2
    for kind in ("bf16", "int8"):
        assert noise.update[kind] == pytest.approx(noise.kept[kind], rel=0.2)
        assert low.update[kind] > 10 * noise.update[kind]
    assert noise.both["fp32"] == noise.iteration > noise.update["bf16"]
    text = " ".join(momentum_dtype.zoo_findings({"noise": noise, "low": low}, {"GPT, a": low}))
    assert f"to {low.update['bf16']:.1e} (low)" in text and "1 matrices" in text


def test_averages_in_bfloat16_stop_short_of_what_does_not_change() -> None:
    """By half a unit in the last place over what a step adds of the rest; rounding by chance does not."""
    of = rounding.all_averages(120, (0.9,), 32)["0.9"]
    constant, noise = of["a constant"], of["noise"]
    assert -0.03 < constant["bf16"]["gain"] < -0.01
    assert all(abs(constant[form]["gain"]) < 1e-3 for form in ("fp32", "bf16, stochastic", "int8"))
    assert noise["fp32"]["error"] < 1e-6 < noise["bf16"]["error"] < noise["bf16, stochastic"]["error"]
    assert of["noise, columns of sizes 1 to 1e-4"]["int8"]["stuck"] > 0.05 > noise["int8"]["stuck"]
    head, _, first, *_ = momentum_dtype.average_table({"0.9": of}).splitlines()
    assert head.count("|") == first.count("|")
    assert "stops 2." in momentum_dtype.average_findings({"0.9": of})[0]


def test_forms_of_momentum_are_compared_with_float32() -> None:
    losses = {"fp32": [5.0, 5.2, 5.4], "bf16": [5.01, 5.2, 5.4], "int8": [5.5, 5.7, 5.9]}
    found = {name: sets.Outcome(values, losses["fp32"]) for name, values in losses.items()}
    (sentence,) = momentum_dtype.loss_findings({"GPT": found})
    assert "bf16 by +0.0033 (+0.02 spreads) and int8 by +0.5000 (+2.50 spreads)" in sentence
    assert sentence.endswith("int8 by more than the spread.")
    assert "| int8 | 5.7000 | 0.2000 |" in sets.losses_table(found, "fp32")


@pytest.mark.parametrize("words", [["nothing"], ["sphere", "--steps", "0"], ["--seeds", "0"]])
def test_wrong_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(words)
    assert " ".join(words[-2:]) in capsys.readouterr().err
