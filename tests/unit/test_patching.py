"""Patches on a throw-away package: any order of imports, copies, and the way back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_muon._patching import Patch, PatchSet

SOURCES = {
    "__init__.py": "",
    "source.py": """
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


def test_apply_and_revert_twice(package: str) -> None:
    source = importlib.import_module(f"{package}.source")
    patches = PatchSet("test", [GREET])
    patches.apply()
    patches.apply()
    assert source.greet() == "HELLO"
    patches.revert()
    patches.revert()
    assert source.greet() == "hello"
