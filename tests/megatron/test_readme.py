"""The commands and the loop of README.md, run as they are printed, and the output that it shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, launch

PAGE = (ROOT / "README.md").read_text()


def marked(name: str) -> str:
    """The indented block under the comment ``name``."""
    found = re.search(rf"<!-- {name} -->\n((?:(?:    .*)?\n)+)", PAGE)
    assert found, name
    return re.sub(r"^    ", "", found[1], flags=re.MULTILINE).strip("\n").replace("\\\n", " ")


def command(name: str, folder: Path) -> list[str]:
    """Arguments of ``megatron_muon run`` in the block's ``torchrun`` line, with what variables of the shell hold."""
    variables = dict(re.findall(r'^(\w+)="([^"]*)"$', marked("run: launcher"), re.MULTILINE))
    line = next(line for line in marked(name).splitlines() if line.startswith("torchrun "))
    for variable, value in variables.items():
        line = line.replace(f"${variable}", value)
    words = shlex.split(line.replace("runs/first", str(folder / "first")))
    assert words[:6] == ["torchrun", "--nproc-per-node", "2", "-m", "megatron_muon", "run"] and "$" not in line
    return [str(ROOT / word) if word.startswith("examples/") else word for word in words[6:]]


def test_the_table_is_what_the_launcher_prints(tmp_path: Path) -> None:
    run = launch(*command("run: launcher", tmp_path), "--muon-dry-run")
    assert run.returncode == 0, run.stderr[-2000:]
    assert marked("output: launcher") in run.stdout


@pytest.mark.slow  # two trainings
def test_the_launcher_trains_and_goes_on_at_another_layout(tmp_path: Path) -> None:
    losses = []
    for name in ("run: launcher", "run: resume"):
        # Processes that are forked here cannot start those that load data; torchrun's do.
        run = launch(*command(name, tmp_path), "--num-workers", "0")
        assert run.returncode == 0, run.stderr[-2000:]
        losses += [float(loss) for loss in re.findall(r"lm loss: (\S+)", run.stdout)]
    assert losses[-1] < losses[0] - 0.5
    assert "/      25 |" in run.stdout
    line = next(line for line in marked("run: resume").splitlines() if line.startswith("python "))
    words = shlex.split(line.replace("runs/first", str(tmp_path / "first")))
    result = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_loop_trains(tmp_path: Path) -> None:
    code = next(text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if text.startswith("# train.py\n"))
    (tmp_path / "train.py").write_text(code)
    run = launch(str(tmp_path / "train.py"))
    assert run.returncode == 0, run.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", run.stdout)]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.5


def test_the_recipe_for_megatron_bridge_is_the_one_that_is_run() -> None:
    """``tests/clients`` runs that of the page about frameworks."""
    recipe = next(text for text in re.findall(r"```python\n.*?```", PAGE, re.DOTALL) if "# Megatron-Bridge\n" in text)
    assert recipe in (ROOT / "docs" / "frameworks.md").read_text()
