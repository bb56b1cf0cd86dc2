"""Options and variants of the optimizer; names that flags take are listed once."""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, Muon, MuonConfig, MuonOptions, NorMuon, Variant, choices, register_variant
from megatron_muon.optimizers.matrices import Matrices
from megatron_muon.optimizers.registry import VARIANTS, variant_asked_for
from megatron_muon.optimizers.stages import Work

PACKAGE = Path(__file__).parents[2] / "megatron_muon"


def made(**options: Any) -> Muon:
    return Muon([torch.nn.Parameter(torch.eye(3))], **options)


def test_an_object_and_keywords_say_the_same_and_keywords_count() -> None:
    options = MuonOptions(scale_mode="moonlight", scalar_betas=(0.8, 0.9), eps=1e-9)
    by_object = made(options=options, momentum=0.5)
    by_name = made(scale_mode="moonlight", scalar_betas=(0.8, 0.9), eps=1e-9, momentum=0.5)
    assert by_object.config == by_name.config and by_object.defaults == by_name.defaults
    both = made(options=options, scale_mode="none", scalar_eps=1e-3)
    assert (both.config.scale_mode, both.config.eps, both.defaults["scalar_eps"]) == ("none", 1e-9, 1e-3)
    assert options == MuonOptions(scale_mode="moonlight", scalar_betas=(0.8, 0.9), eps=1e-9)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"options": {"eps": 1e-9}}, TypeError, r"^options {'eps': 1e-09}: give a MuonOptions"),
        ({"options": MuonConfig()}, TypeError, r"^options MuonConfig\(.*\): give a MuonOptions"),
        ({"options": {}}, TypeError, r"^options {}: give a MuonOptions"),
        ({"scalar_betas": 0.9}, ConfigError, r"^scalar_betas 0.9: give two numbers"),
        ({"damping_depth": "2"}, ConfigError, r"^damping_depth '2': give a finite number"),
        ({"scale_mode": "moonlight_hidden", "hidden_size": "64"}, ConfigError, "hidden_size 64: give the model's"),
        ({"variant": ["normuon"]}, ConfigError, r"^variant \['normuon'\]: choose one of"),
    ],
)
def test_options_of_wrong_types_are_refused_by_name(wrong: dict[str, Any], error: type, message: str) -> None:
    """They stopped at errors of Python that name no option, such as "object of type 'float' has no len()"."""
    with pytest.raises(error, match=message):
        made(**wrong)


def test_defaults_are_those_of_the_flags() -> None:
    assert made().config == MuonConfig()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scale_mod", r"^Muon has no option scale_mod \(did you mean scale_mode\?\)"),
        ("nestrov", r"\(did you mean nesterov\?\)"),
        ("maximize", r"^Muon has no option maximize \(there are .*scale_mode.*\)"),
    ],
)
def test_unknown_options_are_refused(name: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        made(**{name: 1})


def test_wrong_values_of_an_object_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^eps -1: give a positive number"):
        made(options=MuonOptions(eps=-1))
    with pytest.raises(ValueError, match="hidden_size 0: give the model's hidden size"):
        made(options=MuonOptions(scale_mode="moonlight_hidden"))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr("megatron_muon.optimizers.registry.VARIANTS", dict(VARIANTS))
    monkeypatch.setattr("megatron_muon.choices.VARIANTS", names := list(choices.VARIANTS))
    monkeypatch.setattr("megatron_muon.knobs.VARIANTS", names)
    monkeypatch.setattr("megatron_muon.optimizers.stages.VARIANTS", names)


def test_variants_of_users_are_known_by_name(registry: None) -> None:
    with pytest.raises(ConfigError, match=r"variant 'halved': choose one of none, muon, .*, or give an object"):
        made(variant="halved")
    with pytest.raises(ConfigError, match="--muon-variant halved: choose one of none, polargrad"):
        MuonConfig(variant="halved").validate()

    @register_variant
    class Halved(Variant):
        name = "halved"

        def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
            return [update.direction / 2 for update in matrices.updates]

    MuonConfig(variant="halved").validate()
    asked = variant_asked_for({"optimizer": "muon"}, MuonConfig(variant="halved").as_settings())
    moved = []
    for variant in ("none", "halved", Halved(), asked):
        optimizer = made(variant=variant, lr=1.0, weight_decay=0.0)
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = torch.eye(3)
        optimizer.step()
        moved.append(torch.eye(3) - param.detach())
    assert optimizer.checkpoint_rule == "halved"
    for half in moved[1:]:
        torch.testing.assert_close(half, moved[0] / 2)
    with pytest.raises(ConfigError, match="Other: NorMuon has the name"):
        register_variant(type("Other", (Variant,), {"name": "normuon"}))
    with pytest.raises(ConfigError, match=r"Nameless.name '': give the class a name"):
        register_variant(type("Nameless", (Variant,), {"name": ""}))
    for misused in ("halved", Halved(), None, int):
        with pytest.raises(TypeError, match="give it a subclass of Variant"):
            register_variant(misused)  # type: ignore[type-var]


def test_a_variant_serves_one_optimizer() -> None:
    """It keeps vectors and radii of its optimizer's weights: a second one gets another of the same options."""

    class Odd(Variant):
        def __init__(self, factor: float = 2.0) -> None:
            self.times = factor

    variant = NorMuon(beta2=0.5)
    with pytest.raises(ValueError, match="lr -1"):
        made(variant=variant, lr=-1.0)
    first, second = made(variant=variant), made(variant=variant)
    assert first.variant is variant is not second.variant
    assert isinstance(second.variant, NorMuon) and second.variant.beta2 == 0.5
    odd = Odd()
    kept = made(variant=odd)
    with pytest.raises(
        ConfigError, match=r"^a Odd that another optimizer has, too, .* keep its factor as an attribute"
    ):
        made(variant=odd)
    del kept


def test_a_second_run_of_a_step_is_refused() -> None:
    class Twice(Variant):
        def update(self, work: Work) -> None:
            work.run()
            work.run()

    once, twice = made(lr=1.0), made(variant=Twice(), lr=1.0)
    for optimizer in (once, twice):
        optimizer.param_groups[0]["params"][0].grad = torch.eye(3)
    once.step()
    with pytest.raises(RuntimeError, match=r"^Twice.update calls work.run\(\) again") as error:
        twice.step()
    assert "the step had begun" in error.value.__notes__[0]
    assert torch.equal(*(optimizer.param_groups[0]["params"][0] for optimizer in (once, twice)))


def texts_in(node: ast.AST) -> list[str]:
    """The strings that stand side by side in a tuple, a list, a set or a call."""
    match node:
        case ast.Tuple(elts=values) | ast.List(elts=values) | ast.Set(elts=values) | ast.Call(args=values):
            return [each.value for each in values if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return []


def test_names_that_flags_take_are_listed_once() -> None:
    """Two lists with four names in common are two sources of one choice. How to split a weight differs by weight."""
    known = {name for field in fields(MuonConfig) for name in _values(field.metadata["check"])} - {"split", "whole"}
    texts = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    found = [
        (some, f"{path.relative_to(PACKAGE)}:{node.lineno}")  # type: ignore[attr-defined]
        for path, text in texts.items()
        if sum(f'"{name}"' in text for name in known) >= 3
        for node in ast.walk(ast.parse(text))
        if len(some := known.intersection(texts_in(node))) >= 3
    ]
    assert len(found) > 5
    assert not [(a, b) for (some, a), (other, b) in combinations(found, 2) if len(some & other) >= 4 or some == other]


def _values(check: Any) -> tuple[str, ...]:
    """The names that a check of :func:`megatron_muon.knobs.one_of` lets pass."""
    contents = (cell.cell_contents for cell in check.__closure__ or ())
    return next((each for each in contents if isinstance(each, tuple)), ())


def test_tools_and_examples_import_what_there_is() -> None:
    """Most of them are run by hand alone."""
    root, missing = PACKAGE.parent, []
    for path in sorted([*(root / "tools").rglob("*.py"), *(root / "examples").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
                module = sys.modules.get(str(node.module))  # others need Megatron, which takes seconds
                names = [name.name for name in node.names if module and not hasattr(module, name.name)]
                missing += [f"{path.name}: {node.module}.{name}" for name in names if not _is_module(node.module, name)]
    assert not missing


def _is_module(package: str | None, name: str) -> bool:
    return importlib.util.find_spec(f"{package}.{name}") is not None


@pytest.mark.parametrize("wrong", [None, [], [torch.ones(1, 1, 3)], [torch.ones(1, 3, 3)] * 2, [1.0]])
def test_directions_of_another_shape_are_refused(wrong: Any) -> None:
    """One row for all was added to every row of the weight."""

    class Wrong(Variant):
        def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
            return wrong  # type: ignore[no-any-return]

    optimizer = made(variant=Wrong())
    optimizer.param_groups[0]["params"][0].grad = torch.eye(3)
    with pytest.raises(TypeError, match=r"^Wrong.adapt must return a list with one tensor of the shape .* 1 updates"):
        optimizer.step()
