"""The module that the patches add to Megatron-Core, by itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "tools" / "upstream" / "extension_points.py"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("MEGATRON_CORE_PLUGINS", raising=False)
    spec = importlib.util.spec_from_file_location("extension_points_for_the_test", SOURCE)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Plugin:
    """An entry point of the group."""

    def __init__(self, name: str, load: Callable[[], None]) -> None:
        self.name = name
        self.load = lambda: load


def found(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *plugins: Plugin) -> list[str]:
    groups: list[str] = []

    def entry_points(group: str) -> tuple[Plugin, ...]:
        groups.append(group)
        return plugins

    monkeypatch.setattr(module, "entry_points", entry_points)
    return groups


def greet(name: str) -> str:
    return f"hello {name}"


def loudly(original: Callable[..., str]) -> Callable[..., str]:
    return lambda name: original(name).upper()


def politely(original: Callable[..., str]) -> Callable[..., str]:
    def polite(name: str, title: str = "Dr") -> str:
        return original(f"{title} {name}") + ", welcome"

    return polite


@pytest.mark.parametrize("choice,asked", [(None, []), ("", []), ("a", ["megatron_core.plugins"])])
def test_nothing_is_loaded_that_the_environment_does_not_name(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, choice: str | None, asked: list[str]
) -> None:
    calls: list[str] = []
    groups = found(monkeypatch, module, Plugin("a", lambda: calls.append("a")), Plugin("b", lambda: calls.append("b")))
    if choice is not None:
        monkeypatch.setenv("MEGATRON_CORE_PLUGINS", choice)
    point = module.extension_point(greet)
    assert groups == []  # nothing is looked for at import
    assert point("you") == point("you") == "hello you"
    assert (groups, calls) == (asked, ["a"] if asked else [])
    assert inspect.signature(point) == inspect.signature(greet) and point.__name__ == "greet"


def test_replacements_see_those_before_and_can_be_taken_back(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found(monkeypatch, module)
    call = module.extension_point(greet)
    point = module.points[f"{__name__}:greet"]
    point.add(loudly)
    point.add(politely)
    assert call("you") == "HELLO DR YOU, welcome"
    assert list(inspect.signature(call).parameters) == ["name", "title"]
    point.remove(loudly)
    assert call("you") == "hello Dr you, welcome"
    point.remove(politely)
    assert call("you") == "hello you" and point.current is greet
    assert inspect.signature(call) == inspect.signature(greet)


def test_methods(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, module)

    class Greeter:
        @module.extension_point
        def greet(self, name: str) -> str:
            return f"hello {name}"

        @staticmethod
        @module.extension_point
        def part(name: str) -> str:
            return f"bye {name}"

    def with_self(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, name: (type(self).__name__, original(self, name))

    prefix = f"{__name__}:test_methods.<locals>.Greeter"
    module.points[f"{prefix}.greet"].add(with_self)
    module.points[f"{prefix}.part"].add(lambda original: staticmethod(loudly(original)))
    assert Greeter().greet("you") == ("Greeter", "hello you")
    assert Greeter().part("you") == Greeter.part("you") == "BYE YOU"


def test_plugins_are_loaded_once_before_the_first_call(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    call = module.extension_point(greet)
    calls: list[str] = []

    def load() -> None:
        calls.append("loaded")
        module.points[f"{__name__}:greet"].add(loudly)

    monkeypatch.setenv("MEGATRON_CORE_PLUGINS", "loud")
    found(monkeypatch, module, Plugin("loud", load))
    assert [call("you"), call("you")] == ["HELLO YOU"] * 2 and calls == ["loaded"]


@pytest.mark.parametrize("choice,expected", [("b", ["b"]), (" b , a ", ["a", "b"])])
def test_choice(module: ModuleType, monkeypatch: pytest.MonkeyPatch, choice: str, expected: list[str]) -> None:
    calls: list[str] = []
    found(monkeypatch, module, *(Plugin(name, lambda name=name: calls.append(name)) for name in "ba"))
    monkeypatch.setenv("MEGATRON_CORE_PLUGINS", choice)
    module.load_plugins()
    assert calls == expected


def test_a_choice_that_is_not_installed(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, module, Plugin("a", lambda: None))
    monkeypatch.setenv("MEGATRON_CORE_PLUGINS", "a,c")
    with pytest.raises(ValueError, match=r"MEGATRON_CORE_PLUGINS=a,c: not installed: c. Installed: \['a'\]."):
        module.load_plugins()


def test_a_plugin_that_fails_stops_the_run(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise OSError("no such version.")

    found(monkeypatch, module, Plugin("a", load))
    message = "The plug-in a cannot be loaded: no such version. To run without it: MEGATRON_CORE_PLUGINS="
    call = module.extension_point(greet)
    monkeypatch.setenv("MEGATRON_CORE_PLUGINS", "a")
    for _ in range(2):  # whoever catches the error does not go on without the plug-in
        with pytest.raises(RuntimeError, match=message):
            call("you")


def test_it_imports_the_standard_library_only() -> None:
    code = f"import sys; before = set(sys.modules); import runpy; runpy.run_path({str(SOURCE)!r}); "
    code += "print([name for name in sys.modules if name.split('.')[0] not in sys.stdlib_module_names | before])"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "[]\n"


def test_the_package_declares_itself(tmp_path: Path) -> None:
    from tests.patched import metadata_folder

    [distribution] = importlib.metadata.distributions(path=[str(metadata_folder())])
    [entry] = distribution.entry_points.select(group="megatron_core.plugins")
    assert entry.name == "megatron_muon" and entry.value == "megatron_muon.plugin:load"
    assert callable(entry.load())
