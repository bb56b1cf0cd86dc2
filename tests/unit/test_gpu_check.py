"""``python -m tools.gpu_check`` itself: what fails is seen, what hangs is ended, what has passed is kept."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.gpu_check import command, page, process
from tools.gpu_check.command import PARTS, Part, main
from tools.gpu_check.process import START
from tools.gpu_check.report import repository
from tools.gpu_check.targets import TARGETS

GOOD = """
import os, signal, subprocess, sys, time
from pathlib import Path
from tools.gpu_check.report import Item, NotRunError
COUNTS = Path(__file__).with_name("counts")

def count(name):
    with COUNTS.open("a") as file:
        file.write(name + " ")

def passes(report):
    count("passes")
    report.check("one is one", True, "1")
    report.row("numbers", size=4, ms=1.23456)

def reaches(report):
    count("reaches")
    report.target("rate", 0.9, "a model")

def items(setting):
    return [Item("passes", passes), Item("reaches", reaches)]
"""

BAD = (
    GOOD
    + """
def wrong(report):
    count("wrong")
    report.check("two is three", False, "2, 3")

def raises(report):
    raise ValueError("no such thing")

def silent(report):
    pass

def absent(report):
    raise NotRunError("megatron-core is not installed")

def misses(report):
    report.target("rate", float("nan"), "a model")

def crashes(report):
    count("crashes")
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(report):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    COUNTS.with_name("child").write_text(str(child.pid))
    time.sleep(60)

def items(setting):
    works = (passes, wrong, raises, silent, absent, misses, crashes)
    return [*(Item(work.__name__, work) for work in works), Item("hangs", hangs, 0.4), Item("last", passes)]
"""
)

BROKEN = "import no_such_module\n"

GROWS = (
    GOOD.partition("def items")[0]
    + """
def wrong(report):
    count("wrong")
    report.check("two is three", False)

def items(setting):
    return [Item("wrong", wrong), *([Item("passes", passes)] if COUNTS.exists() else [])]
"""
)

SLOW = """
import time
from tools.gpu_check.report import Item

def quick(report):
    report.check("quick", True)

def slow(report):
    time.sleep(60)

def items(setting):
    return [Item("quick", quick), Item("slow", slow), Item("after", quick)]
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command with parts whose modules have these texts: exit code, document, and what was printed."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "LEAST_S", 0.1)
    monkeypatch.setattr(command, "CPU_PATIENCE", 1.0)
    monkeypatch.setattr(process, "MARGIN_S", 0.2)

    def call(sources: dict[str, str], *arguments: str, limit: float = 30.0) -> tuple[int, dict[str, Any], str]:
        for name, text in sources.items():
            (tmp_path / f"part_{name}.py").write_text(text)
        parts = {name: Part(f"Part {name}", limit, f"part_{name}") for name in sources}
        code = main(["--device", "cpu", "--out", str(tmp_path / "out"), *arguments], parts)
        assert (tmp_path / "out" / "gpu.md").read_text() == page.render(document(tmp_path))
        return code, document(tmp_path), capsys.readouterr().out

    return call


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "gpu.json").read_text())


def counts(folder: Path) -> list[str]:
    return (folder / "counts").read_text().split()


def states(found: dict[str, Any], part: str) -> dict[str, str]:
    return {name: result["state"] for name, result in found["parts"][part]["items"].items()}


def test_what_passes_is_kept_and_again_repeats_it(run: Callable[..., Any], tmp_path: Path) -> None:
    code, found, text = run({"good": GOOD})
    assert code == 0 and "2 items passed" in text and "FAILED" not in text
    assert states(found, "good") == {"passes": "passed", "reaches": "passed"}
    assert run({"good": GOOD})[0] == 0
    assert counts(tmp_path) == ["passes", "reaches"]
    assert run({"good": GOOD}, "--again")[0] == 0
    assert counts(tmp_path) == ["passes", "reaches"] * 2
    written = (tmp_path / "out" / "gpu.md").read_text()
    assert "| 4 | 1.23 |" in written and "1 of 1 checks passed" in written
    assert "a model: 0.9" in written and "Nothing." in written


def test_every_failure_is_seen_and_the_rest_is_run(run: Callable[..., Any], tmp_path: Path) -> None:
    code, found, text = run({"bad": BAD, "broken": BROKEN, "good": GOOD})
    assert code == 1
    failed = dict.fromkeys(("wrong", "raises", "silent", "misses", "crashes", "hangs"), "failed")
    assert states(found, "bad") == {"passes": "passed", "absent": "not run", **failed, "last": "passed"}
    assert states(found, "broken") == {START: "failed"} and states(found, "good")["reaches"] == "passed"
    items = found["parts"]["bad"]["items"]
    assert "SIGSEGV" in items["crashes"]["reason"] and "still at it" in items["hangs"]["reason"]
    assert items["silent"]["reason"] == "it checked nothing"
    assert "no_such_module" in found["parts"]["broken"]["items"][START]["reason"]
    summary = text[text.index("FAILED, 7:") :]
    for part in ("two is three: 2, 3", "ValueError: no such thing", "rate of a model is inf", "bad: crashes: "):
        assert part in summary
    assert "bad: absent: megatron-core is not installed" in text
    written = (tmp_path / "out" / "gpu.md").read_text()
    assert "* bad, wrong: two is three: 2, 3" in written and "missed 1 of 2" in written
    assert "* megatron-core is not installed (bad, absent)" in written
    assert not _is_alive(int((tmp_path / "child").read_text()))
    # The next call repeats what failed, and that alone.
    assert run({"bad": BAD})[0] == 1
    assert counts(tmp_path) == ["passes", "wrong", "crashes", "passes", "passes", "reaches", "wrong", "crashes"]


def test_a_part_over_its_limit_has_failed_and_over_the_budget_is_left(run: Callable[..., Any], tmp_path: Path) -> None:
    code, found, text = run({"slow": SLOW, "good": GOOD}, limit=1.0)
    assert code == 1 and states(found, "good")["passes"] == "passed"
    assert states(found, "slow") == {"quick": "passed", "slow": "failed", "after": "unfinished"}
    assert "the part was still at it after its 1 s" in text
    begin = time.monotonic()
    code, found, text = run({"slow": SLOW, "good": GOOD}, "--again", "--minutes", "0.02")
    assert time.monotonic() - begin < 8
    assert code == 3 and states(found, "slow") == {"quick": "passed", "slow": "unfinished", "after": "unfinished"}
    assert states(found, "good") == {START: "unfinished"} and "Left for another call, 3" in text


def test_what_was_never_run_comes_before_what_failed(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run({"grows": GROWS, "good": GOOD}, "--part", "grows")[0] == 1
    assert run({"grows": GROWS, "good": GOOD})[0] == 1
    assert counts(tmp_path) == ["wrong", "passes", "reaches", "passes", "wrong"]


@pytest.mark.parametrize(("seconds", "state"), [(2.0, "unfinished"), (6.0, "failed")])
def test_an_item_that_came_last_has_not_failed(seconds: float, state: str, tmp_path: Path) -> None:
    part = process.PartRun("", "cpu", 10.0, False, 1.0, tmp_path / "log", lambda item, result: None)
    assert part._late(seconds)["state"] == state


def test_results_of_another_machine_are_put_aside(run: Callable[..., Any], tmp_path: Path) -> None:
    run({"good": GOOD})
    path = tmp_path / "out" / "gpu.json"
    path.write_text(path.read_text().replace('"cpu"', '"cuda"', 1))
    code, _, text = run({"good": GOOD})
    assert code == 0 and "other circumstances" in text and counts(tmp_path) == ["passes", "reaches"] * 2
    assert '"cuda"' in (tmp_path / "out" / "gpu-old-1.json").read_text()


def test_targets_are_reached_from_the_right_side() -> None:
    for target in TARGETS.values():
        assert target.reached(target.limit) and not target.reached(float("nan"))
        assert target.reached(target.limit * 1.01) is target.at_least


def test_the_committed_page_is_of_the_committed_results() -> None:
    folder = repository() / "docs" / "results"
    results = folder / "gpu.json"
    known = json.loads(results.read_text()) if results.exists() else None
    assert (folder / "gpu.md").read_text() == page.render(known)


def test_parts_have_modules() -> None:
    for name, part in PARTS.items():
        assert part.module or (repository() / "tools" / "gpu_check" / "parts" / f"{name}.py").exists()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
