"""What is installed is whole, says its version once, and needs nothing that only a checkout has."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import megatron_muon
from tests.launch import TIMEOUT

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_muon"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

OF_A_CHECKOUT = re.compile(r"\b(docs|examples)/|\b\w+\.md\b")
"""Files that an installed package does not have."""

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from copies of what a wheel is made of: setuptools writes beside its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    line = [sys.executable, "-W", "ignore", "-c", BUILD, str(out)]
    result = subprocess.run(line, cwd=source, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return next(out.glob("*.whl"))


def files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in files()} == {name for name in names if ".dist-info/" not in name}
    assert "megatron_muon/py.typed" in names


def test_its_metadata(wheel: Path) -> None:
    archive, version = zipfile.ZipFile(wheel), megatron_muon.__version__
    folder = f"megatron_muon-{version}.dist-info"
    metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("megatron-muon", version)
    assert metadata["License-Expression"] == "Apache-2.0" and f"{folder}/licenses/LICENSE" in archive.namelist()
    assert set(metadata.get_all("Provides-Extra") or []) == {"training", "docs", "dev"}
    entries = archive.read(f"{folder}/entry_points.txt").decode()
    assert "[megatron_core.plugins]\nmegatron_muon = megatron_muon.plugin:load" in entries


def test_the_version_is_written_in_one_place_and_the_changelog_begins_with_it() -> None:
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    headings = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(name for name in headings if name != "Unreleased") == megatron_muon.__version__


def messages(tree: ast.AST) -> list[ast.Constant]:
    """All text in a file but docstrings, which readers of the code see."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in texts if id(text) not in bare]


def test_no_message_points_to_a_file_that_is_not_installed() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{text.lineno}: {text.value}"
        for path in PACKAGE.rglob("*.py")
        for text in messages(ast.parse(path.read_text()))
        if OF_A_CHECKOUT.search(str(text.value))
    ]
    assert not found, "\n".join(["give what the reader needs in the message itself:", *found])


def test_messages_are_told_from_docstrings() -> None:
    tree = ast.parse('"""See docs/a.md."""\nraise E(f"see docs/b.md {x}" "and c.md")')
    assert len(messages(tree)) == 2 and all(OF_A_CHECKOUT.search(str(text.value)) for text in messages(tree)[:1])


def test_files_have_no_licence_of_their_own_but_those_that_contributing_names() -> None:
    """One licence for all, in LICENSE and pyproject.toml; what is somebody else's is listed."""
    owner = re.compile(r"SPDX-License-Identifier|Copyright \(c\)|\(c\) \d{4}")
    listed = (ROOT / "CONTRIBUTING.md").read_text().partition("## Licence\n")[2]
    assert listed, "CONTRIBUTING.md has a section on the licence"
    for folder in ("megatron_muon", "examples", "tools", "tests", "docs"):
        for path in {*(ROOT / folder).rglob("*")} - {Path(__file__)}:
            name = str(path.relative_to(ROOT))
            if path.suffix not in (".py", ".sh", ".md", ".html", ".json") or "upstream" in path.parts:
                continue
            if owner.search(path.read_text()):
                assert f"`{name}`" in listed, f"{name} names another licence or owner: CONTRIBUTING.md, Licence"
    for path in (ROOT / "examples" / "data").iterdir():
        assert f"`{path.relative_to(ROOT)}`" in listed, path


@pytest.mark.slow
def test_plan_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """In a folder with nothing but the unpacked wheel and a file of flags."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    flags = tmp_path / "flags.args"
    flags.write_bytes((ROOT / "examples" / "models" / "llama3_8b.args").read_bytes())
    line = [sys.executable, "-m", "megatron_muon", "plan", "--model", str(flags)]
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Newton-Schulz on the busiest rank" in result.stdout
