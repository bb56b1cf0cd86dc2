"""Examples of jobs: files of flags train, launch.sh gives a run what a file has, scripts do what they say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_muon.monitor import metrics
from megatron_muon.planning.flags import read_flags
from tests.launch import ROOT, SCRIPT, TIMEOUT, check, launch
from tests.megatron.planner import Planner

JOBS = sorted((ROOT / "examples" / "jobs").glob("*.args"))
FAMILIES = sorted((ROOT / "examples" / "models").glob("*.args"))

SAYS = {
    "dense": ("up 160 x 64", "tensor parallel 2: auto"),
    "experts": ("experts.local_experts.*.linear_fc2.weight", "layer-wise"),
    "hybrid": ("decoder.layers.*.self_attention.in_proj.weight", "z 64 x 64, beta 4 x 64 adam"),
    "mla_muonclip": ("k_nope 4 of 16 x 24", "QK-clip"),
}
"""What the report of a job shows: that its flags did what its comments say."""


LONG = ("dense", "hybrid")


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG), id=path.stem) for path in JOBS]
)
def test_a_job_trains(path: Path, tmp_path: Path) -> None:
    file = read_flags(str(path))
    ranks = int(file.plan_options[file.plan_options.index("--world-size") + 1])
    log = tmp_path / "log.jsonl"
    output = check(launch(str(SCRIPT), *file.flags, "--train-iters", "5", "--muon-log-jsonl", str(log), ranks=ranks))
    points = metrics.read(log).train
    assert len(points) == 5 and (points[-1].loss or 0) < (points[0].loss or 0)
    for word in SAYS[path.stem]:
        assert word in output, f"{word} is not in the report of {path.name}"


@pytest.mark.parametrize("path", [*JOBS, *FAMILIES], ids=lambda path: path.stem)
def test_launch_gives_all_flags_and_what_follows_them(path: Path) -> None:
    file = read_flags(str(path))
    environment = {**os.environ, "PYTHON": "echo", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    line = [str(ROOT / "examples" / "launch.sh"), str(path), "--save", "a b"]
    result = subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=60)
    words = shlex.split(result.stdout)
    flags = [*file.flags, "--save", "a", "b"]
    assert words[-len(flags) :] == flags
    assert "--nnodes 2" in result.stdout and "--node-rank 1 --master-addr node0" in result.stdout
    ranks = min(8, int(file.plan_options[file.plan_options.index("--world-size") + 1]))
    assert f"--nproc-per-node {ranks} " in result.stdout


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_plan_confirms_a_job(planner: Planner, path: Path) -> None:
    """Those of examples/models are in tests/megatron/test_plan.py."""
    outcome = planner.command(["--model", str(path)])
    assert outcome.code == 0, outcome.errors


def test_a_loop_of_ones_own() -> None:
    output = check(launch(str(ROOT / "examples" / "own_loop.py"), "--tp", "2", "--steps", "12"))
    assert "q 64 x 64, k 32 x 64, v 32 x 64" in output
    first, last = map(float, re.findall(r"loss of the first step (\S+), of the last (\S+)", output)[0])
    assert last < 0.9 * first


@pytest.mark.slow
@pytest.mark.parametrize(
    "script,picture",
    [("switch_optimizer.py", "losses.png"), ("muonclip.py", "muonclip.png")],
    ids=["switch", "muonclip"],
)
def test_a_comparison(script: str, picture: str, tmp_path: Path) -> None:
    """Several runs of torchrun's, one after the other, and a picture of them."""
    line = [sys.executable, str(ROOT / "examples" / script), "--steps", "6", "--device", "cpu"]
    line += ["--out", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=2 * TIMEOUT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert (tmp_path / "out" / picture).exists()


def test_every_example_is_listed() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    files = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.sh"), *JOBS, *FAMILIES]
    assert [path.name for path in files if f"{path.relative_to(ROOT / 'examples')}`" not in page] == []
