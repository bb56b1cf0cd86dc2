"""Configs and command lines from before ``install()``: they get the options that they lack, and a line says so."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import sys
from typing import Any

import pytest

from megatron_muon import ConfigError, MuonConfig
from tests.megatron.test_arguments import MODEL
from tests.megatron.test_config_fields import WAYS, classes, subclass
from tests.pool import RankPool


def from_before(way: str) -> tuple[dict[str, Any], str]:
    """The options of a config that was built before ``install()``, and what is said."""
    import megatron_muon

    cls = subclass("Early")
    config = cls(optimizer="muon", muon_num_ns_steps=6)
    config.muon_qkv = "per_head"
    megatron_muon.install(MuonConfig(router="adam"))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        muon = MuonConfig.from_optimizer_config(WAYS[way](config))
    names = ("num_ns_steps", "qkv", "router", "tp_mode")
    return {name: getattr(muon, name) for name in names}, said.getvalue()


@pytest.mark.parametrize("way", ["as it is", "replace", "fields", "deepcopy"])
def test_a_config_from_before_install(pool: RankPool, way: str) -> None:
    """Nobody chose blockwise: it must not be taken for a choice by a copy either."""
    read, said = pool.run(from_before, 1, way)[0]
    assert read == {"num_ns_steps": 6, "qkv": "per_head", "router": "adam", "tp_mode": "auto"}
    assert said == (
        "megatron_muon: an OptimizerConfig is from before install(); options that it lacks are those given to "
        "install() (muon_tp_mode auto instead of blockwise: Megatron-Core's default, which is not taken for a "
        "choice; whoever wants it says so by install(MuonConfig(...))).\n"
    )


def copied_from_before(source: str, cls: str) -> tuple[Any, ...]:
    """A config made field by field of arguments that were parsed before ``install()``, or of what a file has."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.training import arguments

    if source == "arguments":
        sys.argv = ["pretrain.py", *MODEL.split(), "--optimizer", "muon", "--muon-num-ns-steps", "6"]
        held = {name: value for name, value in vars(arguments.parse_args()).items() if "dtype" not in name}
    else:
        held = dataclasses.asdict(OptimizerConfig(optimizer="muon", muon_num_ns_steps=6))
    made = classes()[cls]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        config = made(**{field.name: held[field.name] for field in dataclasses.fields(made) if field.name in held})
        muon = MuonConfig.from_optimizer_config(config)
    return (
        muon,
        "an OptimizerConfig was given all of Megatron-Core's Muon options and none of this package's"
        in said.getvalue(),
    )


@pytest.mark.parametrize(
    ("source", "cls"),
    [("arguments", "OptimizerConfig"), ("arguments", "Early"), ("file", "OptimizerConfig"), ("file", "Late")],
)
def test_values_from_before_install(pool: RankPool, source: str, cls: str) -> None:
    """As slime, ms-swift and others copy arguments, past Megatron's own function for it."""
    assert pool.run(copied_from_before, 1, source, cls)[0] == (MuonConfig(num_ns_steps=6), True)


class Delegating:
    """Another base, with attributes of its own."""

    def __getattr__(self, name: str) -> str:
        if name == "elsewhere":
            return "found"
        raise AttributeError(name)


def unusual_classes() -> dict[str, Any]:
    """Subclasses from before ``install()``: one that says something itself, one with slots, one with another base."""
    from megatron.core.optimizer import OptimizerConfig

    import megatron_muon

    @dataclasses.dataclass
    class Recipe(OptimizerConfig):
        muon_tp_mode: str = "blockwise"
        muon_router: str = "adam"

    @dataclasses.dataclass(slots=True)
    class Slots(OptimizerConfig):
        pass

    @dataclasses.dataclass
    class Mixed(OptimizerConfig, Delegating):
        pass

    early = {"Recipe": Recipe(optimizer="muon"), "Slots": Slots(optimizer="muon")}
    of_a_file = dataclasses.asdict(OptimizerConfig(optimizer="muon"))
    megatron_muon.install()
    configs = {
        **early,
        "replaced": dataclasses.replace(early["Recipe"]),
        "of a file": Recipe(**of_a_file),
    }
    found: dict[str, Any] = {}
    for name, config in configs.items():
        muon = MuonConfig.from_optimizer_config(config)
        found[name] = (muon.tp_mode, muon.router)
    found["Mixed"] = (Mixed().elsewhere, hasattr(Mixed(), "nowhere"))
    return found


def test_unusual_subclasses_from_before_install(pool: RankPool) -> None:
    """What a class says itself is chosen, of what it lacks nothing is; other bases keep their attributes."""
    own = ("blockwise", "adam")
    assert pool.run(unusual_classes, 1)[0] == {
        "Recipe": own,
        "replaced": own,
        "of a file": own,
        "Slots": ("auto", "muon"),
        "Mixed": ("found", False),
    }


def parsed(flags: str, install_at: str, given: dict[str, Any] | None) -> tuple[Any, ...]:
    """The options that Megatron makes of a command line, and what is said; ``install()`` comes at one of the stages."""
    import megatron_muon

    if given is not None:
        megatron_muon.install()
    from megatron.training import arguments, training

    def at(stage: str) -> None:
        if stage == install_at:
            megatron_muon.install(None if given is None else MuonConfig(**given))

    sys.argv = ["pretrain.py", *MODEL.split(), *flags.split()]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        at("first")
        args = arguments.parse_args()
        at("parsed")
        arguments.validate_args(args)
        at("checked")
        try:
            config, _ = training.get_megatron_optimizer_config(args)
        except ConfigError as error:
            return str(error), ""
    lines = [line for line in said.getvalue().splitlines() if line.startswith("megatron_muon:")]
    if config.optimizer == "adam":
        return args.muon_log_jsonl, "\n".join(lines)  # which the recorder of every run reads
    return MuonConfig.from_optimizer_config(config), "\n".join(lines)


def test_options_given_to_install_are_the_defaults_of_flags(pool: RankPool) -> None:
    given = {"router": "adam", "momentum": 0.8}
    muon, _ = pool.run(parsed, 1, "--optimizer muon --muon-momentum 0.7", "first", given)[0]
    assert muon == MuonConfig(router="adam", momentum=0.7)


@pytest.mark.parametrize("stage", ["parsed", "checked"])
def test_options_given_to_install_after_the_command_line(pool: RankPool, stage: str) -> None:
    refusal, _ = pool.run(parsed, 1, "--optimizer muon", stage, {"router": "adam"})[0]
    assert refusal == (
        "install(MuonConfig(router='adam')) was called after the command line was read, which has --muon-router muon: "
        "call it before, or give the flag."
    )


@pytest.mark.parametrize("stage", ["parsed", "checked"])
def test_install_after_the_command_line(pool: RankPool, stage: str) -> None:
    """Megatron's own defaults, momentum 0.9 and blockwise, are not taken for choices; what was given is kept."""
    muon, said = pool.run(parsed, 1, "--optimizer muon --muon-num-ns-steps 6", stage, None)[0]
    assert muon == MuonConfig(num_ns_steps=6)
    assert said == (
        "megatron_muon: the command line is from before install(); options that it lacks are the defaults "
        "(muon_tp_mode auto instead of blockwise, muon_momentum 0.95 instead of 0.9: Megatron-Core's default, which is "
        "not taken for a choice; whoever wants it says so by install(MuonConfig(...)))."
    )


@pytest.mark.parametrize("stage", ["parsed", "checked"])
def test_install_after_the_command_line_of_adam(pool: RankPool, stage: str) -> None:
    assert pool.run(parsed, 1, "--optimizer adam", stage, None)[0] == ("", "")


def with_wrapped_constructor(wraps: bool) -> list[Any]:
    """Another tool has wrapped ``OptimizerConfig.__init__``; what a config has then, and whether it is put back."""
    from megatron.core.optimizer import OptimizerConfig

    import megatron_muon

    original = OptimizerConfig.__init__

    def typed(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)

    OptimizerConfig.__init__ = functools.wraps(original)(typed) if wraps else typed
    try:
        megatron_muon.install(MuonConfig(nesterov=True))
        config = OptimizerConfig("muon", muon_qkv="per_head", muon_momentum=0.5)
        muon = MuonConfig.from_optimizer_config(dataclasses.replace(config, lr=1.0))
        megatron_muon.uninstall()
        return [muon.nesterov, muon.qkv, muon.momentum, muon.tp_mode, OptimizerConfig.__init__ is typed]
    finally:
        OptimizerConfig.__init__ = original


def test_a_constructor_that_others_have_wrapped(pool: RankPool) -> None:
    """With ``functools.wraps`` and without: a checker of types, a registry of configs."""
    for wraps in (False, True):
        assert pool.run(with_wrapped_constructor, 1, wraps)[0] == [True, "per_head", 0.5, "auto", True]
