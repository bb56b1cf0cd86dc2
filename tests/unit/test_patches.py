"""The git patches: what the tool makes, applied by git, and this package on sources that have all or some of them."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_muon import plugin
from megatron_muon.plugin.native import hook_of, native_targets
from tests.patched import patched_tree, run, stored_patches
from tools.upstream.__main__ import ROOT, all_patches, folder_of, installed, version_of
from tools.upstream.edits import Change, path_of
from tools.upstream.git import AUTHOR, EMAIL
from tools.upstream.series import RELEASES

VERSION = version_of(installed())
pytestmark = pytest.mark.skipif(VERSION not in RELEASES, reason=f"no patches for megatron-core {VERSION}")
SERIES = RELEASES["0.19.2"]
AT_RUN_TIME = {  # what is added to a class is no function that could be asked
    f"megatron.core.optimizer.optimizer_config:OptimizerConfig.{name}"
    for name in ("__dataclass_fields__", "__annotations__", "__init_subclass__", "__getattr__", "__repr__", "__eq__")
}


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with patched_tree() as folder:
        yield folder


def targets(changes: tuple[Change, ...]) -> set[str]:
    """The targets of the hooks that ``changes`` make native."""
    return {hook_of(name) for change in changes for name in (*change.points, *change.fixes)}


def closure(change: Change) -> set[int]:
    """The numbers in the series of a change and of what it needs."""
    found = {SERIES.index(change)}
    return found.union(*(closure(needed) for needed in change.needs))


def test_the_patches_are_what_the_tool_makes() -> None:
    folder = folder_of(VERSION)
    stored = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.patch")}
    assert stored == all_patches(installed(), VERSION)


def test_every_hook_has_a_patch() -> None:
    hooks = {target for target, _ in plugin.describe()}
    missing = hooks - targets(SERIES) - AT_RUN_TIME
    assert not missing, f"tools/upstream/series.py has no patch for {sorted(missing)}"
    assert targets(SERIES) == hooks - AT_RUN_TIME


@pytest.mark.parametrize("folder", sorted((ROOT / "patches").glob("core_v*")), ids=lambda folder: folder.name)
def test_every_patch_can_be_sent(folder: Path) -> None:
    """An author without a machine, a message that says why, lines that fit, and nothing of this package."""
    for path in folder.rglob("*.patch"):
        text = path.read_text()
        header, _, diff = text.partition("\ndiff --git ")
        assert f"\nFrom: {AUTHOR} <{EMAIL}>\n" in header, path.name
        assert header.endswith(f"\nSigned-off-by: {AUTHOR} <{EMAIL}>\n") and "Copyright" not in diff, path.name
        *message, _ = header.splitlines()  # the last line is the sign-off
        assert len(re.split(r"\n\n", header)) >= 2 and all(len(line) <= 80 for line in message), path.name
        added = [line[1:] for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
        assert added and all(len(line) <= 100 and line == line.rstrip() for line in added), path.name
        assert not re.search(r"megatron_muon|/(work|home|tmp|root|usr)/", "\n".join(added)), path.name


@pytest.mark.parametrize("version", RELEASES)
def test_patches_follow_the_series(version: str) -> None:
    """Those of other versions cannot be made again without the sources: at least messages and lines are the series'."""
    paths = sorted(folder_of(version).glob("*.patch"))
    assert len(paths) == len(RELEASES[version])
    for path, change in zip(paths, RELEASES[version], strict=True):
        header, _, diff = path.read_text().partition("\ndiff --git ")
        assert change.body in header and change.subject in header.replace("\n ", " "), path.name
        added = "".join(f"{line[1:]}\n" for line in diff.splitlines() if line.startswith("+"))
        for edit in change.edits:
            assert f"+++ b/{edit.path}\n" in diff, path.name
            new = [line for line in edit.new.splitlines() if line.strip() and line not in edit.old.splitlines()]
            assert all(line in added for line in new), path.name


def test_the_index_names_every_patch() -> None:
    text = (ROOT / "patches" / "README.md").read_text()
    for folder in (ROOT / "patches").glob("core_v*"):
        for path in folder.glob("*.patch"):
            assert path.stem.split("-")[0] in text and path.read_text(), path.name
    for change in SERIES:
        assert change.subject in text, change.subject


@pytest.mark.parametrize("change", SERIES, ids=lambda change: change.subject)
def test_each_applies_with_no_more_than_it_needs(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is found in the sources: its hooks are native, with those of what it needs."""
    paths = {path_of(installed(), name) for each in SERIES for name in each.points} | {
        edit.path for each in SERIES for edit in each.edits
    }
    paths |= {f"megatron/{package}/__init__.py" for package in ("core", "training")}
    numbers = sorted(closure(change))
    with patched_tree([stored_patches()[number] for number in numbers], paths) as tree:
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tree))
            native = native_targets(plugin._PATCHES.patches)
        assert len(native) == len(set(native))
        assert set(native) == targets(tuple(SERIES[number] for number in numbers))
        for name in (*change.points, *change.fixes):
            text = (tree / path_of(tree, name)).read_text()
            compile(text, name, "exec")
            imported = "from megatron.core.extension_points import extension_point\n" in text
            assert imported == bool(re.search(r"@extension_point|= extension_point\(", text)), name


EVERYTHING = """
import importlib, json, sys
def load_all():
    from megatron_muon import plugin
    for module in sorted({patch.module for patch in plugin._PATCHES.patches}):
        importlib.import_module(module)
# To OptimizerConfig:
ADDED = {"__dataclass_fields__", "__annotations__", "__init_subclass__", "__getattr__", "__repr__", "__eq__"}
def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and name != "megatron.core.extension_points":
            for attribute, value in list(vars(module).items()):
                found[name, attribute] = id(value)
                if isinstance(value, type) and value.__module__.startswith("megatron."):
                    for member, inner in list(vars(value).items()):
                        found[name, attribute, member] = id(inner)
    return found
def replaced(during, before):
    return [key for key in during if during[key] != before.get(key) and key[-1] not in ADDED]
"""


CHECK_POINTS = """
from megatron.core.extension_points import load_plugins, points
load_plugins()  # finds this package, which is installed
hooked = {target for target, reason in plugin.describe() if "(native: nothing is hooked)" not in reason}
assert hooked == {f"megatron.core.optimizer.optimizer_config:OptimizerConfig.{name}" for name in ADDED}
print(json.dumps({name: len(point._makes) for name, point in points.items()}))
megatron_muon.uninstall()
assert all(point.current is point.original for point in points.values())
assert snapshot() == before
"""


def check_points(output: str, announcements: int) -> None:
    """Each point has each hook once, and each installation said so."""
    *said, counts = output.splitlines()
    hooks = [target for target, _ in plugin.describe() if target not in AT_RUN_TIME]
    count, added = len(set(hooks)), len(AT_RUN_TIME)
    line = f"megatron_muon: this Megatron-LM has {count} of {count + added} hooks natively; hooked: "
    assert [each.startswith(line) for each in said] == [True] * announcements, said
    assert {target for each in said for target in each.removeprefix(line).split(", ")} == AT_RUN_TIME
    fixed = {target for change in SERIES for target in change.fixes}
    expected = {target: hooks.count(target) for target in hooks if target not in fixed}
    assert {hook_of(name): made for name, made in json.loads(counts).items()} == expected


def test_the_first_call_finds_the_plugin(tree: Path) -> None:
    """Imports do not; install() after it hooks nothing."""
    code = EVERYTHING + textwrap.dedent("""
        import megatron.core.optimizer, megatron.training.training
        assert not [name for name in sys.modules if name.startswith("megatron_muon")]
        config = megatron.core.optimizer.OptimizerConfig(optimizer="muon", lr=0.1, muon_router="adam")
        assert (config.muon_router, config.muon_tp_mode) == ("adam", "auto")
        import megatron_muon
        from megatron_muon import plugin
        assert plugin.is_installed()
        load_all()
        during = snapshot()
        megatron_muon.install()
        plugin.uninstall()
        before = snapshot()
        assert not replaced(during, before), replaced(during, before)
        megatron_muon.install()
    """)
    check_points(run(code + CHECK_POINTS, tree), 2)


def test_install_before_the_imports_hooks_nothing_twice(tree: Path) -> None:
    """No attribute of Megatron is replaced; fields are added to OptimizerConfig."""
    code = EVERYTHING + textwrap.dedent("""
        import megatron_muon
        from megatron_muon import plugin
        megatron_muon.install()
        assert not [name for name in sys.modules if name.startswith("megatron.")]
        load_all()
        during = snapshot()
        megatron_muon.uninstall()
        before = snapshot()
        assert not replaced(during, before), replaced(during, before)
        megatron_muon.install()
    """)
    check_points(run(code + CHECK_POINTS, tree), 2)


@pytest.mark.slow
def test_a_fork_with_some_of_the_patches() -> None:
    """What it has is native, what it lacks is hooked: each target one of the two, and without install() too."""
    some = [0, 1, 10, 12]  # the predicate, the tag, extension points, ownership
    native = targets(tuple(SERIES[number] for number in some))
    code = EVERYTHING + textwrap.dedent("""
        load_all()
        before = snapshot()
        import torch
        from megatron.core.optimizer.emerging_optimizers import _is_nonlinear_or_embedding
        assert not _is_nonlinear_or_embedding(torch.nn.Parameter(torch.ones(2, 2)))
        from megatron_muon import plugin
        assert plugin.is_installed()
        for target, reason in plugin.describe():
            module, _, path = target.partition(":")
            key = (module, *path.split("."))
            changed = snapshot()[key] != before.get(key)
            print(json.dumps([target, "(native" in reason, changed]))
    """)
    with patched_tree([stored_patches()[number] for number in some]) as tree:
        said, *lines = run(code, tree).splitlines()
    count = len({target for target, _ in plugin.describe()})
    assert said.startswith(f"megatron_muon: this Megatron-LM has {len(native)} of {count} hooks natively; hooked: ")
    for target, is_native, is_replaced in map(json.loads, lines):
        assert is_native == (target in native), target
        if not target.endswith("TEDotProductAttention"):  # hooked, but without TransformerEngine nothing is replaced
            assert is_replaced == (target not in native), target


def test_the_wheel_has_none_and_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert native_targets(plugin._PATCHES.patches) == []
    plugin._print_native()
    assert capsys.readouterr().out == ""
    assert not any("native" in reason for _, reason in plugin.describe())


def test_what_is_native_is_said_on_the_first_rank(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tree))
    monkeypatch.setenv("RANK", "1")
    plugin._print_native()
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    plugin._print_native()
    assert "hooks natively; hooked: megatron.core.optimizer.optimizer_config:" in capsys.readouterr().out


def test_upstream_style(tree: Path) -> None:
    """Points are declared right on the function; the new module imports the standard library alone."""
    module = ast.parse((tree / "megatron/core/extension_points.py").read_text())
    imported = [node.module for node in ast.walk(module) if isinstance(node, ast.ImportFrom)]
    assert imported == ["collections.abc", "importlib.metadata", "typing"]
