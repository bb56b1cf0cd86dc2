"""What measured steps write: the same numbers at every layout, on all ways out, and nothing where nobody asks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.launch import records
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.loading import Outcome, failure
from tests.megatron.test_nonfinite import state_of, step_with
from tests.megatron.test_recording import log
from tests.megatron.test_routing import MOE
from tests.pool import RankPool
from tests.slow import with_slow

ADAM_ROUTER = {"muon_router": "adam"}
"""Gradients of a router's rows add up to zero: whether Newton-Schulz lifts the last direction, rounding decides."""


def measured(layout: Layout, weights: str, file: str, steps: int = 5, **optimizer: Any) -> None:
    """Train, with a record of every second step."""
    asked = {"muon_log_interval": 2, "muon_log_jsonl": file, "muon_log_per_layer": True, **ADAM_ROUTER, **optimizer}
    harness.start(layout, weights=weights, optimizer=asked, early=True, **MOE).losses(steps)


LAYOUTS = {
    "tp2": (2, Layout(tp=2, sp=True)),
    "pp2": (2, Layout(pp=2)),
    "vpp": (2, Layout(pp=2, vpp=2)),
    "cp2": (2, Layout(cp=2)),
    "ep2": (2, Layout(ep=2)),
    "dp2": (2, Layout()),
    "layer_wise": (2, Layout(layer_wise=True, ddp_buffers=True)),
}


@pytest.fixture(scope="module")
def alone(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Initial weights, and the record of one rank."""
    folder = tmp_path_factory.mktemp("watching")
    pool.run(harness.save_initial_weights, 1, str(folder / "weights"), **MOE)
    pool.run(measured, 1, Layout(), str(folder / "weights"), str(folder / "alone.jsonl"))
    return str(folder / "weights"), folder / "alone.jsonl"


@pytest.mark.parametrize("name", with_slow(LAYOUTS, "pp2", "vpp", "cp2", "dp2", "tp2"))
def test_layouts_measure_the_same(pool: RankPool, tmp_path: Path, alone: tuple[str, Path], name: str) -> None:
    weights, expected = alone
    ranks, layout = LAYOUTS[name]
    pool.run(measured, ranks, layout, weights, str(tmp_path / "record.jsonl"))
    found, wanted = records(tmp_path / "record.jsonl", "muon"), records(expected, "muon")
    assert [each["iteration"] for each in found] == [1, 2, 4]
    for mine, its in zip(found, wanted, strict=True):
        assert mine["rates"] == its["rates"] == {"lr": 0.01, "weight_decay": 0.1, "scalar_lr": 0.01}
        for part in ("classes", "layers"):
            assert list(mine[part]) == list(its[part])
            for each, numbers in mine[part].items():
                wanted_stats = {"unlifted", "update_ratio", *(["cosine"] if mine["iteration"] > 1 else [])}
                assert numbers.keys() == its[part][each].keys() >= wanted_stats
                # One batch's gradient has singular values at rounding: how far these are lifted is rounding's matter.
                told = numbers.keys() - ({"defect", "unlifted"} if mine["iteration"] == 1 else set())
                for stat in told:
                    value = numbers[stat]
                    assert value == pytest.approx(its[part][each][stat], rel=1e-3, abs=1e-4), (each, stat)
    experts = wanted[0]["classes"]["decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight[gate]"]
    assert experts["matrices"] == 16
    its = [numbers["matrices"] for layer, numbers in wanted[0]["layers"].items() if "linear_fc1.weight[gate]" in layer]
    assert its == [4, 4, 4, 4]


def calls_of_steps(intervals: list[int]) -> list[tuple[list[Counter[str]], bool]]:
    """For each interval, what each of two steps asks torch.distributed for, and whether there is a probe."""
    from megatron_muon.optimizers.muon import Muon
    from megatron_muon.plugin.optimizer_state import leaves

    found: list[tuple[list[Counter[str]], bool]] = []
    for interval in intervals:
        run = harness.start(Layout(tp=2, overlap=False), optimizer={"muon_log_interval": interval}, replicas=False)
        run.losses(3)  # the first step compares plans
        steps: list[Counter[str]] = []
        for _ in range(2):
            counts: Counter[str] = Counter()
            with pytest.MonkeyPatch.context() as patch:
                for name in (
                    "all_reduce",
                    "all_gather_object",
                    "all_gather_into_tensor",
                    "broadcast",
                    "batch_isend_irecv",
                ):
                    counted(patch, name, counts)
                run.losses(1)
            steps.append(counts)
        inner = [leaf.optimizer for leaf, _ in leaves(run.optimizer)]
        found.append((steps, any(isinstance(each, Muon) and each.probe is not None for each in inner)))
    return found


def counted(patch: pytest.MonkeyPatch, name: str, counts: Counter[str]) -> None:
    original = getattr(dist, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return original(*args, **kwargs)

    patch.setattr(dist, name, count)


def test_what_is_off_asks_for_nothing(pool: RankPool) -> None:
    """Steps that are not measured have the exchanges of a run without; a measured one has two more after it."""
    off, on, often = pool.run(calls_of_steps, 2, [0, 100, 3])[1]
    assert off[1] is False and on[1] is True
    assert off[0][0] == off[0][1] == on[0][0] == on[0][1]
    assert often[0][0] == off[0][0] + Counter(all_reduce=2)  # it begins with what the third has found


def curves(file: str) -> tuple[list[tuple[str, float, int]], list[dict[str, Any]]]:
    """What Megatron's TensorBoard writer is given."""
    with log() as megatrons:
        run = harness.start(Layout(), optimizer={"muon_log_interval": 2, "muon_log_jsonl": file, **ADAM_ROUTER}, **MOE)
        run.losses(3)
    return megatrons.points, records(Path(file), "muon")


def test_curves_are_means_of_classes(pool: RankPool, tmp_path: Path) -> None:
    points, (_, record) = pool.run(curves, 1, str(tmp_path / "record.jsonl"))[0]
    assert {iteration for _, _, iteration in points} == {1, 2}
    values = {name: value for name, value, _ in points}
    name = "decoder.layers.*.mlp.experts.local_experts.*.linear_fc2.weight"
    numbers = record["classes"][name]
    assert values[f"muon/defect/{name}"] == numbers["defect"][1]
    assert values[f"muon/update_ratio (largest)/{name}"] == numbers["update_ratio"][2]
    load = values[f"muon/expert load (largest over mean)/{name}"]
    assert load == numbers["gradient_norm"][2] / numbers["gradient_norm"][1] > 1
    assert values["muon/rates/lr"] == 0.01 and f"muon/momentum_norm (largest)/{name}" not in values


def resumed(folder: str, file: str) -> None:
    """Save after step 3, go on to step 5, and start again from there."""
    asked = {"muon_log_interval": 2, "muon_log_jsonl": file}
    run = harness.start(Layout(tp=2), optimizer=asked)
    run.losses(3)
    harness.save_run(run, folder)
    run.losses(2)
    again = harness.start(Layout(tp=2), optimizer=asked)
    harness.load_run(again, folder)
    again.losses(2)


def test_a_resumed_run_measures_in_the_same_steps(pool: RankPool, tmp_path: Path) -> None:
    """Outside of Megatron's loop, too: lines of steps that are made again are cut."""
    file = tmp_path / "record.jsonl"
    pool.run(resumed, 2, str(tmp_path / "saved"), str(file))
    kinds = [(each["iteration"], kind) for kind in ("start", "muon") for each in records(file, kind)]
    assert sorted(kinds) == [(0, "start"), (1, "muon"), (2, "muon"), (3, "start"), (4, "muon")]


def beside(file: str) -> None:
    """Two models in a loop of their own, of which the second begins to learn later."""
    asked = {"muon_log_interval": 1, "muon_log_jsonl": file}
    actor, critic = (harness.start(Layout(), optimizer=asked) for _ in range(2))
    critic.losses(3)
    actor.losses(2)
    critic.losses(1)


def test_models_in_one_process_leave_each_others_lines(pool: RankPool, tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    pool.run(beside, 1, str(file))
    assert [each["iteration"] for each in records(file, "muon")] == [1, 2, 1, 3]
    assert [each["iteration"] for each in records(file, "start")] == [0, 0]


def skipping(file: str) -> list[bool]:
    """The step that is due has a gradient that is not a number."""
    run = harness.start(Layout(tp=2), optimizer={"muon_log_interval": 2, "muon_log_jsonl": file, "clip_grad": 0.0})
    values = (1.0, float("nan"), 1.0, 1.0)
    return [step_with(run, value, "decoder.layers.0.mlp.linear_fc1.weight", 0) for value in values]


def test_a_skipped_step_is_made_up_for(pool: RankPool, tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    assert pool.run(skipping, 2, str(file)) == [[True, False, True, True]] * 2
    assert [each["iteration"] for each in records(file, "muon")] == [1, 2]


def stopped(folder: str, file: str) -> tuple[Outcome, bool]:
    """A learning rate far too high in the first step; whether the state is that after the step, and can be saved."""
    rates = {"lr": 1e4, "min_lr": 1e4, "weight_decay": 0.0}
    asked = {"muon_log_interval": 100, "muon_log_jsonl": file, "muon_alarm": "stop", **rates}
    run = harness.start(Layout(tp=2), optimizer=asked)
    run.losses(1)
    after = state_of(run)
    told = failure(lambda: run.losses(1))
    now = state_of(run)
    harness.save_run(run, folder)
    return told, all(torch.equal(value, now[name]) for name, value in after.items())


def test_an_alarm_stops_all_ranks_between_two_steps(pool: RankPool, tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    (told, is_whole), theirs = pool.run(stopped, 2, str(tmp_path / "saved"), str(file))
    assert (told, is_whole) == theirs and is_whole
    assert told[0] == "RuntimeError" and told[1].startswith("Muon stopped by --muon-alarm stop, before step 2 has")
    (alarm, *_) = records(file, "alarm")
    assert alarm["iteration"] == 1 and alarm["text"] in told[1]
    assert [each["iteration"] for each in records(file, "muon")] == [1]


def drifting(file: str, alarm: str) -> list[Outcome]:
    """One data-parallel rank has another bit in a weight after its second step."""
    asked = {"muon_check_replicas_interval": 2, "muon_log_jsonl": file, "muon_alarm": alarm}
    run: Run = harness.start(Layout(overlap=False), optimizer=asked, replicas=False)
    run.losses(2)
    if dist.get_rank() == 1:
        for name, param in run.chunks[0].named_parameters():
            if name.endswith("layers.1.self_attention.linear_proj.weight"):
                param.data.view(-1)[3] += 1e-3
    return [failure(lambda: run.losses(1)) for _ in range(2)]


def test_replicas_that_differ_are_told(pool: RankPool, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("warn.jsonl", "stop.jsonl")]
    assert pool.run(drifting, 2, str(files[0]), "warn") == [[("", ""), ("", "")]] * 2
    ((first, _), theirs) = pool.run(drifting, 2, str(files[1]), "stop")
    assert theirs[0] == first and first[0] == "RuntimeError"
    for file in files:
        (alarm,) = records(file, "alarm")
        assert (alarm["alarm"], alarm["iteration"]) == ("replicas_differ", 2)
        assert "layers.1.self_attention.linear_proj.weight" in alarm["text"]
    assert alarm["text"] in first[1]
