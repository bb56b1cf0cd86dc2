"""What a patched Megatron-LM has, read from its sources, and hooks in the form that its extension points take."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_muon import plugin
from megatron_muon._patching import Patch
from megatron_muon.config import MuonConfig
from megatron_muon.plugin import native, options

SOURCE = """
from megatron.core.extension_points import extension_point


@extension_point
def function():
    def inner():
        pass


class First:
    @extension_point
    def method(self):
        pass

    @staticmethod
    @extension_point
    def static():
        pass

    def plain(self):
        # @extension_point would stand here
        pass


if True:
    class Second:
        @extension_point
        def method(
            self,
        ):
            pass


class Data:
    pass


Data.__init__ = extension_point(Data.__init__)


def fixed():
    return find_spec


def not_fixed():
    return 1
"""
POINTS = ["function", "First.method", "First.static", "Second.method", "Data.__init__"]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Megatron-Core on the path with one module."""
    folder = tmp_path / "megatron" / "core"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('must not be imported')")
    (folder / "example.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def patch(name: str, **changes: str) -> Patch:
    return Patch(f"megatron.core.example:{name}", lambda original: original, "for the test", **changes)


def test_targets_are_found_in_the_sources(sources: Path) -> None:
    names = [*POINTS, "First.plain", "Second.plain", "method", "inner", "Data", "gone"]
    assert native.native_targets(map(patch, names)) == [f"megatron.core.example:{name}" for name in POINTS]
    fixed = [patch(name, fixed_by="find_spec") for name in ("fixed", "not_fixed", "gone")]
    assert native.native_targets(fixed) == ["megatron.core.example:fixed"]
    assert native.native_targets([patch("value", point="megatron.core.example:function")]) == [
        "megatron.core.example:value"
    ]
    elsewhere = Patch("megatron.core.missing:function", lambda original: original, "for the test")
    assert native.native_targets([elsewhere]) == []


def test_the_wheel_has_none_and_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert native.native_targets(plugin._PATCHES.patches) == []
    plugin._print_native()
    assert capsys.readouterr().out == ""
    assert not any("native" in reason for _, reason in plugin.describe())


def test_the_line_is_for_the_first_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    targets = list(dict.fromkeys(target for target, _ in plugin.describe()))
    monkeypatch.setattr(native, "native_targets", lambda patches: targets[1:])
    monkeypatch.setenv("RANK", "1")
    plugin._print_native()
    monkeypatch.setenv("RANK", "0")
    plugin._print_native()
    count = len(targets)
    line = f"megatron_muon: this Megatron-LM has {count - 1} of {count} hooks natively; hooked: {targets[0]}\n"
    assert capsys.readouterr().out == line


def test_attention_is_asked_for_maxima_as_by_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook derives a class; the extension point is the constructor."""
    target = "megatron.core.extensions.transformer_engine:TEDotProductAttention"
    [hook] = [patch for patch in plugin._PATCHES.patches if patch.target == target]
    assert hook.make_at_point is not None and hook.point == f"{target}.__init__"
    seen = []

    def __init__(self: object, config: SimpleNamespace, layer_number: int, *, cp: str) -> None:
        seen.append((config.qk_clip, config.log_max_attention_logit, layer_number, cp))

    class Attention:
        pass

    at_point = hook.make_at_point(__init__)
    config = SimpleNamespace(qk_clip=True, log_max_attention_logit=True, params_dtype=None)
    try:
        for choice in ("exact", "te"):
            options.set_current(MuonConfig(qk_logits=choice))
            for build in (at_point, hook.make(type("Attention", (), {"__init__": __init__}))):
                arguments = (Attention(),) if build is at_point else ()
                build(*arguments, config, 3, cp="p2p")
    finally:
        options.set_current(None)
    assert seen == [(False, False, 3, "p2p")] * 4  # without TransformerEngine 2.9 not even when asked to
    assert config.qk_clip and config.log_max_attention_logit
