"""Megatron's flags of checkpoints, each in runs of its script that stop, save and go on: losses bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import FLAGS, SCRIPT, Result, check, launch, records

LAYOUTS = {"plain": "", "plain_bf16": "--bf16", "layer_wise": "--use-distributed-optimizer --bf16"}
EACH_SHAPE = pytest.mark.parametrize("layout", ["layer_wise", pytest.param("plain", marks=pytest.mark.slow)])
BY_LISTS = "--no-use-layer-wise-param-layout"

SIGNALLED = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import pretrain_gpt
from megatron.training import training

original, steps = training.train_step, []

def train_step(*args, **kwargs):
    steps.append(1)
    if len(steps) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)

training.train_step = train_step
pretrain_gpt.main()
"""


class Runs:
    """Of one layout, in one folder.

    Args:
        folder: of logs and checkpoints.
        layout: one of :data:`LAYOUTS`.
        flags: of every run.
    """

    def __init__(self, folder: Path, layout: str, flags: str = "--ckpt-format torch_dist") -> None:
        self.folder = folder
        self.flags = f"--optimizer muon --train-iters 5 {LAYOUTS[layout]} {flags}"
        self.log = folder / "log.jsonl"

    def start(self, flags: str, script: Path = SCRIPT) -> Result:
        self.log.unlink(missing_ok=True)
        line = f"{self.flags} --muon-log-jsonl {self.log} {flags}"
        return launch(str(script), *FLAGS.split(), *line.split())

    def losses(self, flags: str = "", script: Path = SCRIPT) -> dict[int, float]:
        """By iteration."""
        check(self.start(flags, script))
        return {point["iteration"]: point["losses"]["lm loss"] for point in records(self.log)}

    def saved(self, name: str) -> list[str]:
        return sorted(path.name.removeprefix("iter_000000") for path in (self.folder / name).glob("iter_*"))

    def go_on(self, name: str, expected: dict[int, float], *iterations: int) -> None:
        """From a checkpoint, through these iterations."""
        assert self.losses(f"--load {self.folder / name}") == {each: expected[each] for each in iterations}


@EACH_SHAPE
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path: Path, layout: str) -> None:
    runs, script = Runs(tmp_path, layout), tmp_path / "script.py"
    script.write_text(SIGNALLED)
    whole = runs.losses()
    flags = f"--save {tmp_path}/a --save-interval 100 --exit-signal-handler"
    assert runs.losses(flags, script) == {each: whole[each] for each in (1, 2)} and runs.saved("a") == ["2"]
    runs.go_on("a", whole, 3, 4, 5)


@pytest.mark.parametrize("layout", ["layer_wise", pytest.param("plain_bf16", marks=pytest.mark.slow)])
def test_the_format_torch(tmp_path: Path, layout: str) -> None:
    """Master weights carried classes of this package into the file: ``torch.load`` refused it, and Megatron ended with
    status 0."""
    runs = Runs(tmp_path, layout, f"--ckpt-format torch {BY_LISTS if layout == 'layer_wise' else ''}")
    whole = runs.losses(f"--save {tmp_path}/a --save-interval 3")
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").write_text("3")
    runs.go_on("a", whole, 4, 5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "layer_wise"])
def test_flags_of_saves(tmp_path: Path, layout: str) -> None:
    runs = Runs(tmp_path, layout)
    whole = runs.losses(f"--save {tmp_path}/each --save-interval 1 --save-retain-interval 2")
    assert runs.saved("each") == ["2", "4", "5"]
    assert runs.losses(f"--save {tmp_path}/time --save-interval 100 --exit-duration-in-mins -1") == {1: whole[1]}
    runs.go_on("time", whole, 2, 3, 4, 5)
    runs.losses(f"--save {tmp_path}/number --save-interval 100 --exit-interval 2")
    runs.go_on("number", whole, 3, 4, 5)
    runs.losses(f"--save {tmp_path}/weights --save-interval 2 --exit-interval 2 --no-save-optim")
    assert runs.losses(f"--load {tmp_path}/weights --no-load-optim")[3] == whole[3]
    refused = runs.start(f"--load {tmp_path}/number --no-save-optim")
    assert refused.returncode == 2 and "add --no-load-optim" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "layer_wise"])
def test_global_non_persistent_checkpoints(tmp_path: Path, layout: str) -> None:
    """A run that ended after its last persistent checkpoint goes on from the newer one, which is not."""
    runs = Runs(tmp_path, layout)
    here = f"--non-persistent-ckpt-type global --non-persistent-global-ckpt-dir {tmp_path}/b"
    whole = runs.losses(f"--save {tmp_path}/a --save-interval 2 --non-persistent-save-interval 3 {here}")
    assert runs.saved("b") == ["3"]
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").write_text("2")
    assert runs.losses(f"--load {tmp_path}/a {here}") == {each: whole[each] for each in (4, 5)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "layer_wise"])
def test_flags_of_loads(tmp_path: Path, layout: str) -> None:
    """What starts anew from weights is saved, and goes on as it would have."""
    runs = Runs(tmp_path, layout)
    whole = runs.losses(f"--save {tmp_path}/a --save-interval 2 --exit-interval 4")
    whole |= runs.losses(f"--load {tmp_path}/a")
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").write_text("2")
    for name, flags in {
        "state": f"--load {tmp_path}/a --no-load-optim",
        "finetuned": f"--load {tmp_path}/a --finetune",
        "pretrained": f"--load {tmp_path}/nothing --pretrained-checkpoint {tmp_path}/a",
    }.items():
        first = runs.losses(f"{flags} --save {tmp_path}/{name} --save-interval 4")
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("4")
        runs.go_on(name, first, 5)
    for flag in ("--auto-detect-ckpt-format", *map("--dist-ckpt-strictness {}".format, STRICT)):
        assert runs.losses(f"--load {tmp_path}/a {flag}") == {each: whole[each] for each in (3, 4, 5)}, flag
    adam = Runs(tmp_path, layout, "--ckpt-format torch_dist --optimizer adam")
    check(adam.start(f"--save {tmp_path}/adam --save-interval 4"))
    for strict, word in UPSTREAM.items():
        for each, name in ((runs, "a"), (adam, "adam")):
            failed = each.start(f"--load {tmp_path}/{name} --dist-ckpt-strictness {strict}")
            assert failed.returncode == 1 and word in failed.stderr, (strict, name)


STRICT = ("assume_ok_unexpected", "log_unexpected", "log_all", "raise_unexpected", "ignore_all")
UPSTREAM = {
    "raise_all": "Missing keys (for all ranks): {'rerun_state_machine_state'}. \n",
    "return_unexpected": "AttributeError: 'tuple' object has no attribute 'get'",
    "return_all": "AttributeError: 'tuple' object has no attribute 'get'",
}
"""What ``megatron.training`` makes of the others with Adam as well: of ours there is no key among what is missing."""
