"""Options travel in the ``OptimizerConfig``, whatever is done with it, and never become defaults silently."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import json
import pickle
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, MuonConfig
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool

CHOSEN = {"tp_mode": "distributed", "momentum": 0.7, "router": "adam", "param_rule": ("*.linear_fc2.weight=adam",)}
"""Options that Megatron-Core has too, and others."""
GIVEN = {f"muon_{name}": value for name, value in CHOSEN.items()}


def by_fields(config: Any) -> Any:
    """As frameworks copy a config into one of their own, or out of it."""
    return type(config)(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def through_text(config: Any) -> Any:
    """As through YAML: tuples become lists. Types of numbers are written by each framework in a way of its own."""
    values = dataclasses.asdict(config)
    plain = {name: value for name, value in values.items() if not isinstance(value, torch.dtype)}
    return type(config)(**json.loads(json.dumps(plain)))


WAYS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda config: config,
    "replace": lambda config: dataclasses.replace(config, lr=0.01),
    "fields": by_fields,
    "asdict": lambda config: type(config)(**dataclasses.asdict(config)),
    "text": through_text,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
}


def subclass(name: str) -> type:
    """A class as Megatron-Bridge has it: what the base does after construction is done by another method."""
    from megatron.core.optimizer import OptimizerConfig

    class Derived(OptimizerConfig):
        def __post_init__(self) -> None:
            pass

        def finalize(self) -> None:
            super().__post_init__()

    Derived.__name__ = Derived.__qualname__ = name
    globals()[name] = dataclasses.dataclass(kw_only=True)(Derived)  # pickle looks for it here
    return globals()[name]


def classes() -> dict[str, type]:
    """``OptimizerConfig`` with the hooks, a subclass from before, and one from after ``install()``."""
    from megatron.core.optimizer import OptimizerConfig

    import megatron_muon

    early = subclass("Early")
    megatron_muon.install()
    return {"OptimizerConfig": OptimizerConfig, "Early": early, "Late": subclass("Late")}


def another(value: Any) -> Any:
    """Of the same type."""
    return {bool: not value, int: 7, float: 0.125, str: "other", tuple: ("*=adam",)}[type(value)]


def round_trips(given: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What configs have in the end; of Adam, for which values are carried and not checked."""
    read = {}
    for name, cls in classes().items():
        for way, carry in WAYS.items():
            config = carry(cls(optimizer="adam", **given))
            getattr(config, "finalize", lambda: None)()
            found = {key: getattr(config, key) for key in given}
            read[name, way] = {key: tuple(value) if value == ["*=adam"] else value for key, value in found.items()}
    return read


def test_options_survive_what_is_done_with_a_config(pool: RankPool) -> None:
    """Every one of them, with a value that no default and nobody else gives it."""
    given = {f"muon_{field.name}": another(field.default) for field in dataclasses.fields(MuonConfig)}
    read = pool.run(round_trips, 1, given)[0]
    assert len(read) == 3 * len(WAYS)
    assert read == dict.fromkeys(read, given)


MOE = {"num_layers": 1, "num_moe_experts": 2, "moe_ffn_hidden_size": 24}


def built_from(cls: str, way: str) -> dict[str, Any]:
    """What the optimizer of a model does that is built from a config that came a long way."""
    import megatron_muon
    from megatron_muon.routing.predicate import _is_nonlinear_or_embedding

    config = WAYS[way](classes()[cls](optimizer="muon", lr=0.01, muon_fp32_matmul_prec="highest", **GIVEN))
    from megatron.core.optimizer import get_megatron_optimizer

    layout = Layout()
    layout.initialize()
    chunks = harness.wrap(harness.build_model(layout, **MOE), layout)
    optimizer = get_megatron_optimizer(config, chunks)
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    [muon] = [each for each in inner if isinstance(each, megatron_muon.Muon)]
    scalar = [name for name, param in chunks[0].named_parameters() if _is_nonlinear_or_embedding(param)]
    return {
        "tp_mode": muon.config.tp_mode,
        "momentum": {group["momentum"] for group in muon.param_groups},
        "router": any("router" in name for name in scalar),
        "param_rule": any(name.endswith("linear_fc2.weight") for name in scalar),
    }


@pytest.mark.parametrize(("cls", "way"), [("Early", "as it is"), ("OptimizerConfig", "fields"), ("Late", "text")])
def test_options_reach_the_optimizer(pool: RankPool, cls: str, way: str) -> None:
    """The finalize() of a subclass need not have been called."""
    found = pool.run(built_from, 1, cls, way)[0]
    assert found == {"tp_mode": "distributed", "momentum": {0.7}, "router": True, "param_rule": True}


def looks() -> dict[str, Any]:
    """What the classes look like with the hooks, and whether they are what they were without."""
    from megatron.core.optimizer import OptimizerConfig

    import megatron_muon

    early = subclass("Early")
    before = [dict(vars(cls)) for cls in (OptimizerConfig, early)]
    found: dict[str, Any] = {}
    late = classes()["Late"]
    for cls in (OptimizerConfig, early, late):
        names = [field.name for field in dataclasses.fields(cls)]
        found[cls.__name__] = (
            len(names) == len(set(names)),
            set(inspect.signature(cls).parameters) == set(names) == set(typing.get_type_hints(cls)) & set(names),
            cls() == cls() != cls(muon_router="adam"),
            "muon_router='adam'" in repr(cls(muon_router="adam")),
            cls(0.5).lr if cls is OptimizerConfig else 0.5,
            *(cls.__match_args__[:2] if cls is OptimizerConfig else ("lr", "min_lr")),
        )
    held = early(muon_router="adam")
    megatron_muon.uninstall()
    changed = [
        name
        for cls, then in zip((OptimizerConfig, early), before, strict=True)
        for name in vars(cls).keys() | then.keys()
        if vars(cls).get(name) is not then.get(name) and name not in ("__doc__", "__slotnames__")
    ]
    found["uninstalled"] = (changed, held.muon_router, late(muon_router="adam").muon_router)
    return found


def test_the_classes_are_whole_dataclasses_and_what_they_were_afterwards(pool: RankPool) -> None:
    found = pool.run(looks, 1)[0]
    assert found.pop("uninstalled") == ([], "adam", "adam")
    assert found == dict.fromkeys(("OptimizerConfig", "Early", "Late"), (True, True, True, True, 0.5, "lr", "min_lr"))


def defaults() -> dict[str, Any]:
    """The options of configs for which nothing was chosen, at one time and another."""
    from megatron.core.optimizer import OptimizerConfig

    import megatron_muon

    @dataclasses.dataclass
    class Recipe(OptimizerConfig):
        muon_tp_mode: str = "blockwise"

    def read(cls: type) -> tuple[Any, ...]:
        muon = MuonConfig.from_optimizer_config(cls(optimizer="muon"))
        return muon.tp_mode, muon.router, muon.momentum

    every = classes()
    found = {name: [read(cls)] for name, cls in {**every, "Recipe": Recipe}.items()}
    megatron_muon.install(MuonConfig(router="adam", momentum=0.8, tp_mode="gram", ns_dtype="fp16"))
    for name, cls in {**every, "Recipe": Recipe}.items():
        found[name].append(read(cls))
    return found


def test_defaults_are_those_of_install(pool: RankPool) -> None:
    """What a subclass says itself it has chosen."""
    plain, installed = ("auto", "muon", 0.95), ("gram", "adam", 0.8)
    assert pool.run(defaults, 1)[0] == {
        **{name: [plain, installed] for name in ("OptimizerConfig", "Early", "Late")},
        "Recipe": [("blockwise", "muon", 0.95), ("blockwise", "adam", 0.8)],
    }


def wrapped_by_another_tool(wraps: bool) -> tuple[str, str, str, str]:
    from megatron.core.optimizer import OptimizerConfig

    import megatron_muon

    early = subclass("Early")
    originals = {cls: cls.__init__ for cls in (OptimizerConfig, early)}
    try:
        for cls, original in originals.items():

            def __init__(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> None:
                original(self, *args, **kwargs)

            if wraps:
                __init__.__wrapped__ = original  # type: ignore[attr-defined]
            cls.__init__ = __init__  # type: ignore[misc]
        megatron_muon.install()
        given = OptimizerConfig(0.5, optimizer="muon", muon_router="adam")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            derived = early(optimizer="muon")
            tp_mode = MuonConfig.from_optimizer_config(derived).tp_mode
        return MuonConfig.from_optimizer_config(given).router, given.muon_tp_mode, tp_mode, said.getvalue()
    finally:
        megatron_muon.uninstall()
        for cls, original in originals.items():
            cls.__init__ = original


@pytest.mark.parametrize("wraps", [True, False])
def test_a_constructor_that_another_tool_has_wrapped(pool: RankPool, wraps: bool) -> None:
    """Of the subclass's nobody can tell that it is dataclass's own, if the tool does not: its configs are mended."""
    router, tp_mode, derived, said = pool.run(wrapped_by_another_tool, 1, wraps)[0]
    assert (router, tp_mode, derived) == ("adam", "auto", "auto")
    assert ("is from before install(); options that it lacks are the defaults" in said) is not wraps


def wrong_in(name: str) -> str:
    cls = classes()[name]
    try:
        cls(optimizer="muon", muon_scale_mode="nonsense")
    except ConfigError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize("name", ["OptimizerConfig", "Early", "Late"])
def test_a_wrong_option_is_refused_when_the_config_is_built(pool: RankPool, name: str) -> None:
    """Though the class puts off what Megatron-Core does after construction."""
    message = pool.run(wrong_in, 1, name)[0]
    assert message.startswith("--muon-scale-mode nonsense: choose one of spectral, ")


def misspelt() -> list[str]:
    from megatron.core.optimizer import OptimizerConfig

    import megatron_muon

    megatron_muon.install()
    config = OptimizerConfig(optimizer="muon")
    config.muon_routre = "adam"
    answers = []
    for attempt in (
        lambda: MuonConfig.from_optimizer_config(config),
        lambda: OptimizerConfig(optimizer="muon", muon_routre="adam"),
        lambda: config.muon_roter,
    ):
        try:
            attempt()
        except (ConfigError, TypeError, AttributeError) as error:
            answers.append(str(error))
    return answers


def test_what_is_misspelt_is_an_error(pool: RankPool) -> None:
    read, built, asked = pool.run(misspelt, 1)[0]
    assert read.startswith("OptimizerConfig.muon_routre adam: no such Muon option")
    assert built.endswith("__init__() got an unexpected keyword argument 'muon_routre'")
    assert asked == "'OptimizerConfig' object has no attribute 'muon_roter'"


def two_models() -> list[Any]:
    """Two models with different options in one process, on the buffers of the layer-wise optimizer."""
    import megatron_muon

    first, second = {"muon_router": "adam"}, {"muon_param_rule": ("*.linear_proj.weight=adam",), "muon_momentum": 0.5}
    layout = Layout(ddp_buffers=True, layer_wise=True)
    megatron_muon.install(harness.routing_options(first))
    from megatron.core.optimizer import get_megatron_optimizer

    layout.initialize()
    found: list[Any] = []

    def model() -> list[Any]:
        return harness.wrap(harness.build_model(layout, num_layers=1), layout)

    def momentum(optimizer: Any) -> Any:
        parts = [
            part
            for chained in optimizer.chained_optimizers
            for part in getattr(chained, "chained_optimizers", [chained])
        ]
        return {part.optimizer.config.momentum for part in parts if isinstance(part.optimizer, megatron_muon.Muon)}

    one = get_megatron_optimizer(harness.optimizer_config(layout, **first), model())
    under_the_first = model()
    try:
        get_megatron_optimizer(harness.optimizer_config(layout, **second), under_the_first)
    except ConfigError as error:
        found.append(str(error))
    megatron_muon.install(harness.routing_options(second))
    other = get_megatron_optimizer(harness.optimizer_config(layout, **second), model())
    parts = (one.chained_optimizers[0], other.chained_optimizers[0])
    costs = [part.options_of_cost.momentum for part in parts]  # what owners are chosen by
    return [*found, momentum(one), momentum(other), costs]


def test_a_second_model_with_other_options(pool: RankPool) -> None:
    """What its buffers were laid out by must be what its config has."""
    for refusal, one, other, costs in pool.run(two_models, 2):
        assert (
            "self_attention.linear_proj.weight: DistributedDataParallel was built before the weight's tags" in refusal
        )
        assert (one, other, costs) == ({0.95}, {0.5}, [0.95, 0.5])


def beside_adam() -> tuple[str, str, int]:
    """Options of a Muon model, and of an Adam model beside it."""
    import megatron_muon
    from megatron_muon.plugin import options

    megatron_muon.install()
    layout = Layout()
    muon = harness.optimizer_config(layout, muon_ckpt_changes="accept")
    adam = harness.optimizer_config(layout, name="adam", muon_extra_scale_factor=-1.0, muon_qk_logits_interval=5)
    return options.of(muon).ckpt_changes, options.of(adam).ckpt_changes, options.of(adam).qk_logits_interval


def test_options_of_another_optimizer_are_those_that_act_on_it(pool: RankPool) -> None:
    assert pool.run(beside_adam, 1)[0] == ("accept", "error", 5)
