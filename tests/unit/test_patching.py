"""Patches on a throw-away package: any order of imports, copies, and the way back."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_muon._patching import EXTENSION_POINTS, Patch, PatchSet, holds, in_place_of

SOURCES = {
    "__init__.py": "",
    "source.py": """
from os.path import join

name = "source"


def greet():
    return "hello"


class Base:
    size = 1


class Child(Base):
    pass


flag = None
""",
    "user.py": """
from upstream_example.source import greet
from upstream_example.source import greet as hail
from upstream_example.source import join
other = None
""",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "upstream_example"
    folder.mkdir()
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "upstream_example"
    for name in [name for name in sys.modules if name.partition(".")[0] == "upstream_example"]:
        del sys.modules[name]


def louder(original):
    return lambda: original().upper()


GREET = Patch("upstream_example.source:greet", louder, "for the test")


@pytest.mark.parametrize("first", ["source", "user", None])
def test_every_copy_is_replaced_in_any_order(package: str, first: str | None) -> None:
    if first is not None:
        importlib.import_module(f"{package}.{first}")
    patches = PatchSet("test", [GREET])
    patches.apply()
    user = importlib.import_module(f"{package}.user")
    source = importlib.import_module(f"{package}.source")
    assert (source.greet(), user.greet(), user.hail()) == ("HELLO", "HELLO", "HELLO")
    patches.revert()
    assert (source.greet(), user.greet(), user.hail()) == ("hello", "hello", "hello")


def test_two_sets_wait_for_one_module(package: str) -> None:
    shout = Patch("upstream_example.source:greet", lambda original: lambda: original() + "!", "for the test")
    one, two = PatchSet("one", [GREET]), PatchSet("two", [shout])
    one.apply()
    two.apply()
    source = importlib.import_module(f"{package}.source")
    assert source.greet() == "HELLO!"
    assert type(source.__loader__).__name__ == "SourceFileLoader", "the module keeps its own loader"
    two.revert()
    assert source.greet() == "HELLO"
    one.revert()
    assert source.greet() == "hello"


def test_an_inherited_member_is_put_on_the_child_and_taken_off_again(package: str) -> None:
    source = importlib.import_module(f"{package}.source")
    patches = PatchSet("test", [Patch("upstream_example.source:Child.size", lambda size: size + 1, "for the test")])
    patches.apply()
    assert (source.Base.size, source.Child.size) == (1, 2)
    patches.revert()
    assert "size" not in vars(source.Child) and source.Child.size == 1


def test_none_elsewhere_is_no_copy(package: str) -> None:
    user = importlib.import_module(f"{package}.user")
    patches = PatchSet("test", [Patch("upstream_example.source:flag", lambda original: "on", "for the test")])
    patches.apply()
    assert sys.modules[f"{package}.source"].flag == "on" and user.other is None
    patches.revert()
    assert sys.modules[f"{package}.source"].flag is None


def test_a_missing_attribute_names_the_hook_and_changes_nothing(package: str) -> None:
    source = importlib.import_module(f"{package}.source")
    patches = PatchSet("test", [GREET, Patch("upstream_example.source:gone", lambda original: 1, "it matters")])
    with pytest.raises(AttributeError, match=r"test: upstream_example\.source:gone does not exist.*it matters"):
        patches.apply()
    assert source.greet() == "hello" and not patches.active


def test_a_created_attribute_disappears_again(package: str) -> None:
    source = importlib.import_module(f"{package}.source")
    patches = PatchSet("test", [Patch("upstream_example.source:new", lambda original: 1, "for the test", create=True)])
    patches.apply()
    assert source.new == 1
    patches.revert()
    assert not hasattr(source, "new")


def test_copies_made_meanwhile_stay_reverted(package: str) -> None:
    """A module that is imported between apply and revert holds the replacement; each revert puts the original there."""
    importlib.import_module("upstream_example.source")
    patches = PatchSet("test", [GREET])
    for _ in range(3):
        patches.apply()
        user = importlib.import_module("upstream_example.user")
        assert (user.greet(), user.hail()) == ("HELLO", "HELLO")
        patches.revert()
        assert (user.greet(), user.hail()) == ("hello", "hello")


def test_apply_and_revert_twice(package: str) -> None:
    source = importlib.import_module(f"{package}.source")
    patches = PatchSet("test", [GREET])
    patches.apply()
    patches.apply()
    assert source.greet() == "HELLO"
    patches.revert()
    patches.revert()
    assert source.greet() == "hello"


FAR = "a_framework_elsewhere"


class Lazy(ModuleType):
    """As those of ``transformers``: asked for an attribute, it imports."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


@pytest.fixture
def far(package: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of another package, imported first, with copies."""
    source = importlib.import_module(f"{package}.source")
    module = Lazy(FAR)
    vars(module).update(mine=source.greet, table={"greet": source.greet}, flag=source.flag, path=source.join)
    monkeypatch.setitem(sys.modules, FAR, module)
    return module


def test_copies_in_other_packages_are_found_by_identity(package: str, far: ModuleType) -> None:
    """In a module's own dictionary, whatever it is called there; not in objects, which are left alone."""
    source = importlib.import_module(f"{package}.source")
    flag = Patch("upstream_example.source:flag", lambda original: "on", "for the test")
    size = Patch("upstream_example.source:Child.size", lambda size: size + 1, "for the test")
    patches = PatchSet("test", [GREET, GREET, flag, size])
    patches.apply()
    assert vars(far)["mine"] is source.greet and far.mine() == "HELLO"
    assert far.table["greet"]() == "hello" and vars(far)["flag"] is None
    assert in_place_of(far.table["greet"]) is source.greet and in_place_of(far) is far
    patches.revert()
    assert vars(far)["mine"] is source.greet is far.table["greet"]
    assert in_place_of(source.greet) is source.greet


def test_a_copy_of_the_replacement_goes_back_in_any_package(package: str, far: ModuleType) -> None:
    source = importlib.import_module(f"{package}.source")
    wrapped = Patch("upstream_example.source:greet", lambda original: functools.wraps(original)(louder(original)), "")
    patches = PatchSet("test", [wrapped])
    patches.apply()
    vars(far)["later"] = source.greet
    patches.revert()
    assert far.later() == "hello" and far.later is source.greet


def test_what_upstream_has_from_elsewhere_is_replaced_in_its_own_package_alone(package: str, far: ModuleType) -> None:
    user = importlib.import_module(f"{package}.user")
    patches = PatchSet(
        "test", [Patch("upstream_example.source:join", lambda original: lambda *parts: "ours", "for the test")]
    )
    patches.apply()
    assert user.join("a") == "ours" and far.path is os.path.join
    patches.revert()
    assert user.join is os.path.join


@pytest.mark.parametrize("imported", [False, True])
def test_a_module_is_never_there_without_its_hooks(package: str, imported: bool) -> None:
    """A hook that raises fails the import, and the next one, until it does not; a reload is hooked again."""
    works = [False]

    def sometimes(original: Any) -> Any:
        if not works[0]:
            raise RuntimeError("not today")
        return original.upper()

    patches = PatchSet("test", [GREET, Patch("upstream_example.source:name", sometimes, "for the test")])
    works[0] = imported
    if imported:
        importlib.import_module(f"{package}.source")
    patches.apply()
    if imported:
        importlib.reload(sys.modules[f"{package}.source"])
    for _ in range(0 if imported else 2):
        with pytest.raises(RuntimeError, match="not today"):
            importlib.import_module(f"{package}.user")
        assert patches.active and holds(GREET.target) is None
    works[0] = True
    user = importlib.import_module(f"{package}.user")
    source = importlib.import_module(f"{package}.source")
    assert (source.name, user.greet()) == ("SOURCE", "HELLO")
    patches.revert()
    assert (source.name, user.greet(), source.greet()) == ("source", "hello", "hello")


def test_what_holds_is_observed(package: str) -> None:
    """Not imported; in place; wrapped by others; replaced by others."""
    patches = PatchSet("test", [GREET, GREET])
    patches.apply()
    assert holds(GREET.target) is None
    source = importlib.import_module(f"{package}.source")
    ours = source.greet
    assert holds(GREET.target) is True
    source.greet = functools.wraps(ours)(lambda: ours() + "?")
    assert holds(GREET.target) is True
    source.greet = lambda: "mine"
    assert holds(GREET.target) is False
    source.greet = ours
    patches.revert()
    assert holds(GREET.target) is False


@pytest.fixture
def points(package: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The extension points of a patched upstream, whose ``greet`` is one."""
    path = Path(__file__).parents[2] / "tools" / "upstream" / "extension_points.py"
    spec = importlib.util.spec_from_file_location(EXTENSION_POINTS, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._loaded = True
    monkeypatch.setitem(sys.modules, EXTENSION_POINTS, module)
    source = Path(importlib.import_module(package).__path__[0], "source.py")
    head = f"from {EXTENSION_POINTS} import extension_point\n"
    source.write_text(head + source.read_text().replace("def greet", "@extension_point\ndef greet"))
    for name in ("megatron", "megatron.core"):  # no import of the real ones for it
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
    return module.points


@pytest.mark.parametrize("imported", [False, True])
def test_a_point_is_given_what_is_for_it(package: str, points: dict[str, Any], imported: bool) -> None:
    """Several sets, reverted in any order; no attribute is replaced."""
    if imported:
        importlib.import_module(f"{package}.user")
    shout = Patch("upstream_example.source:greet", lambda original: lambda: original() + "!", "for the test")
    size = Patch("upstream_example.source:Child.size", lambda size: size + 1, "no point")
    one, two = PatchSet("one", [GREET, size]), PatchSet("two", [shout])
    one.apply()
    two.apply()
    user, source = importlib.import_module(f"{package}.user"), importlib.import_module(f"{package}.source")
    assert user.greet is user.hail is source.greet is points["upstream_example.source:greet"].call
    assert user.greet() == "HELLO!" and source.Child.size == 2
    assert (one.native, two.native) == (["upstream_example.source:greet"], ["upstream_example.source:greet"])
    one.revert()
    assert user.greet() == "hello!" and source.Child.size == 1 and one.native == []
    two.revert()
    assert user.greet() == "hello" and user.greet is source.greet


def test_a_point_with_another_name(package: str, points: dict[str, Any]) -> None:
    value = Patch(
        "upstream_example.source:flag",
        lambda original: "on",
        "for the test",
        point="upstream_example.source:greet",
        make_at_point=lambda original: lambda: original() + " at the point",
    )
    patches = PatchSet("test", [value])
    patches.apply()
    source = importlib.import_module(f"{package}.source")
    assert source.greet() == "hello at the point" and source.flag is None
    assert patches.native == ["upstream_example.source:flag"]
    patches.revert()
    assert source.greet() == "hello"


@pytest.mark.parametrize("word,native", [('"hello"', True), ("bonjour", False)])
def test_what_is_fixed_upstream_is_left_alone(package: str, word: str, native: bool) -> None:
    patches = PatchSet("test", [Patch("upstream_example.source:greet", louder, "for the test", fixed_by=word)])
    source = importlib.import_module(f"{package}.source")
    patches.apply()
    assert source.greet() == ("hello" if native else "HELLO")
    assert patches.native == (["upstream_example.source:greet"] if native else [])
    patches.revert()
    assert source.greet() == "hello"
