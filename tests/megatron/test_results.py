"""``tools/results`` end to end, with sizes that show nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.megatron import harness
from tests.pool import RankPool
from tools.results import corpus
from tools.results.model import Setting, Training
from tools.results.transfer import RULES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_an_experiment_writes_its_page_numbers_and_picture(tmp_path: Path) -> None:
    words = ["-m", "tools.results", "coordinates", "--quick", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "coordinates.md").read_text()
    assert 'make results ARGS="coordinates --quick"' in text and "slope over widths" in text
    numbers = json.loads((tmp_path / "coordinates.json").read_text())
    assert set(numbers["slopes"]) == {"transfer", "moonlight"}
    assert (tmp_path / "coordinates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_sets_are_compared_by_the_scripts_of_the_examples_and_on_their_momentum(tmp_path: Path) -> None:
    words = ["-m", "tools.results", "sets", "--quick", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "sets.json").read_text())
    losses = [each for of in numbers["valid_loss"].values() for of_seeds in of.values() for each in of_seeds]
    assert len(losses) == 4 and len(set(losses)) == 4
    assert "Gram" in numbers["told"]["quintic, 5 steps"] and "Gram" not in numbers["told"]["cubic5, standard form"]
    assert "stable rank" in (tmp_path / "sets.md").read_text()


@pytest.mark.slow
def test_activations_change_alike_at_every_width_and_depth(tmp_path: Path) -> None:
    """The coordinate check: slopes of log RMS within 0.05 under the rule of transfer, and none under Moonlight's."""
    words = ["-m", "tools.results", "coordinates", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    slopes = json.loads((tmp_path / "coordinates.json").read_text())["slopes"]
    found = {
        rule: [abs(slope) for sizes in slopes[rule].values() for slope in sizes.values()]
        for rule in ("transfer", "moonlight")
    }
    assert len(found["transfer"]) == 6 and max(found["transfer"]) < 0.05
    assert min(found["moonlight"]) > 0.2


def losses_of(settings: list[Setting]) -> list[list[float]]:
    """Losses of runs that are made one after the other in one process, and their final validation loss."""
    import megatron_muon

    megatron_muon.install()
    harness.Layout().initialize()
    found = []
    for setting in settings:
        training = Training(setting, corpus.load())
        found.append([*(training.advance() for _ in range(setting.steps)), training.validate()])
    return found


def test_a_run_does_not_depend_on_those_before_it(pool: RankPool) -> None:
    small = {"width": 32, "layers": 2, "steps": 3, "batch": 2, "length": 16, "valid_batches": 1}
    muon = Setting(optimizer="muon", rate=0.02, options={"muon_scale_mode": "moonlight"}, **small)
    adam = Setting(optimizer="adam", rate=0.01, **small)
    transferred = replace(muon, base="16x1", options=RULES["transfer"].values["options"])
    first, _, _, last = pool.run(losses_of, 1, [muon, adam, transferred, muon])[0]
    assert first == last
    other = pool.run(losses_of, 1, [replace(muon, seed=1)])[0][0]
    assert other != first


def rates_of(setting: Setting) -> list[float]:
    """Learning rates of the steps of a run."""
    import megatron_muon

    megatron_muon.install()
    harness.Layout().initialize()
    training = Training(setting, corpus.load())
    rates = []
    for _ in range(setting.steps):
        training.advance()
        rates.append(training.optimizer.param_groups[0]["lr"])
    return rates


def test_the_rate_rises_and_falls_to_one_step_above_0(pool: RankPool) -> None:
    setting = Setting(32, 1, "adam", 1.0, steps=5, warmup=0.4, batch=2, length=16)
    assert pool.run(rates_of, 1, setting)[0] == [0.5, 1.0, 0.75, 0.5, 0.25]
    assert pool.run(rates_of, 1, replace(setting, constant=True))[0] == [1.0] * 5
