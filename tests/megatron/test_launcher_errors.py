"""An error under the launcher is told once, by a rank that has it."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.errors import ConfigError
from megatron_muon.plugin.telling import _seconds_before_telling
from tests.pool import RankPool

ROOT = Path(__file__).parents[2]
TIMEOUT = 120
ALONE = """
import os, time
from megatron_muon.checkpoint.errors import CheckpointError
if os.environ["RANK"] == "1":
    raise CheckpointError("the storage is gone")
time.sleep(100)
"""
BOTH = """
from megatron_muon import ConfigError
raise ConfigError("--flag 3: give 4.")
"""


@pytest.mark.parametrize(
    "script,line",
    [
        (ALONE, "megatron_muon: error on rank 1: the storage is gone"),
        # In forked ranks: test_refusal_is_one_line_and_an_exit_code.
        pytest.param(BOTH, "megatron_muon: error: --flag 3: give 4.", marks=pytest.mark.slow),
    ],
    ids=["rank 1 alone", "both"],
)
def test_an_error_is_told_once(tmp_path: Path, script: str, line: str) -> None:
    path = tmp_path / "script.py"
    path.write_text(script)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, "-m", "megatron_muon", "run", "--device", "cpu", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert [text for text in result.stderr.splitlines() if "megatron_muon: error" in text] == [line]
    assert "exitcode  : 2" in result.stderr and str(path) not in result.stderr  # no traceback


def who_tells(shared: bool) -> float | None:
    """Ranks 1 and 2 of three have a model of their own, and fail."""
    import torch.distributed as dist

    ranks = Ranks((dist.new_group([1, 2]),))
    if dist.get_rank() == 0:
        return -1.0

    def fail() -> None:
        raise ConfigError("--flag 3: give 4.")

    try:
        ranks.together(fail) if shared else fail()
    except ConfigError as error:
        return _seconds_before_telling(error)
    return -1.0


def test_the_first_of_the_ranks_that_share_an_error_tells_it(pool: RankPool) -> None:
    assert pool.run(who_tells, 3, True) == [-1.0, 4.0, None]
    assert pool.run(who_tells, 3, False) == [-1.0, 4.0, 4.0]


def end_with(shared: bool, kind: type[Exception]) -> str:
    """What a script prints that has called install(), in which nobody catches an error."""
    import megatron_muon
    from megatron_muon.plugin.telling import TELLING

    def fail() -> None:
        raise kind("--flag 3: give 4.")

    output = io.StringIO()
    megatron_muon.install()
    try:
        Ranks.of_world().together(fail) if shared else fail()
    except Exception as error:
        with contextlib.redirect_stderr(output):
            TELLING._hook(type(error), error, error.__traceback__)
    return output.getvalue()


def test_a_script_without_the_launcher_ends_with_one_message(pool: RankPool) -> None:
    """Other errors, and those of a process in which the hooks are not there, are as ever."""
    for kind in (ConfigError, CheckpointError):
        assert pool.run(end_with, 2, True, kind) == ["megatron_muon: error: --flag 3: give 4.\n", ""]
    assert all("Traceback" in text for text in pool.run(end_with, 2, True, ValueError))


def refused_while_a_module_is_built() -> str:
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    def outer() -> Any:
        return build_module(ModuleSpec(module=Refusing))

    class Outer:
        def __init__(self) -> None:
            outer()

    class Refusing:
        def __init__(self) -> None:
            raise ConfigError("--flag 3: give 4.")

    try:
        build_module(ModuleSpec(module=Outer))
    except ConfigError as error:
        return str(error)
    return "built"


def test_megatron_adds_no_words_to_a_message(pool: RankPool) -> None:
    """Its builder of modules makes another exception of it, at every level: "... when instantiating Outer"."""
    assert pool.run(refused_while_a_module_is_built, 1) == ["--flag 3: give 4."]


@pytest.mark.parametrize("rank,local_rank,seconds", [("0", "0", 0.0), ("8", "0", 2.0), ("9", "1", 4.0)])
def test_rank_0_and_the_first_of_each_machine_do_not_wait_for_others(
    monkeypatch: pytest.MonkeyPatch, rank: str, local_rank: str, seconds: float
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert _seconds_before_telling(ConfigError("--flag 3: give 4.")) == seconds
