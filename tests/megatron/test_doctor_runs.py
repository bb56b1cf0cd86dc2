"""The doctor on a run of two ranks with checkpoints: as it ended, resumed with other flags, after a cut save."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_muon import cpu
from megatron_muon.monitor.plots import METRICS_FILE
from tests.launch import train
from tests.unit.test_doctor import said


@pytest.fixture(autouse=True)
def the_command_redirects_this_process() -> Iterator[None]:
    yield
    cpu.uninstall()


@pytest.mark.slow
def test_a_real_run_with_its_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saves = folder / "checkpoints"
    flags = f"--save {saves} --load {saves} --save-interval 3 --muon-log-interval 2".split()
    train(*flags, "--train-iters", "6", log=folder / METRICS_FILE)
    text, status = said(folder)
    assert status == 0 and text.startswith("run: iteration 6 of 6, finished; 1 start, 2 ranks\n")
    assert "ERROR" not in text and "WARNING" not in text and "2 checkpoints (whole, flags)" in text
    assert "4 measured steps of Muon" in text and "versions" in text and "nothing of Muon was measured" not in text

    shutil.copytree(folder, tmp_path / "first")
    longer = ["--train-iters", "9", "--override-opt_param-scheduler", "--muon-num-ns-steps", "6"]
    train(*flags, *longer, log=folder / METRICS_FILE)
    text, status = said(tmp_path / "first", folder)
    assert status == 0 and "WARNING: resumed at iteration 6 with other settings" in text
    assert (
        "  --muon-num-ns-steps default -> 6\n" in text and "all 6 losses that both have are equal, bit for bit" in text
    )
    assert "  checkpoint: --muon-num-ns-steps 5 -> 6\n" in text

    (saves / "iter_0000009" / "metadata.json").unlink()  # as a save leaves it that was killed
    text, status = said(folder)
    assert status == 1 and "ERROR: the checkpoint cannot be resumed from as it is" in text
    assert "--ckpt-step with one that is whole: 6, 3" in text
