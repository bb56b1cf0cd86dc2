"""Copies from before ``install()`` in code of frameworks, and what the report says of hooks and rates."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN
from tests.pool import RankPool

FRAMEWORK = """
import functools
from megatron.core.optimizer import ParamPredicate, get_megatron_optimizer
from megatron.core.optimizer import get_megatron_optimizer as build
from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer
from megatron.core.optimizer.muon import get_megatron_muon_optimizer
from megatron.core.optimizer import _get_megatron_emerging_optimizer as inner

TABLE = {"megatron": get_megatron_optimizer}
bound = functools.partial(get_megatron_optimizer, use_gloo_process_groups=False)
OLD = (get_megatron_muon_optimizer,)


def by_default(*args, factory=get_megatron_optimizer, **kwargs):
    return factory(*args, **kwargs)


PREDICATE = ParamPredicate(name="of muon", fn=is_managed_by_layer_wise_optimizer)
PARTIAL = ParamPredicate(name="of muon too", fn=functools.partial(is_managed_by_layer_wise_optimizer))
LATE = lambda: ParamPredicate(name="of muon", fn=is_managed_by_layer_wise_optimizer)
"""


@contextlib.contextmanager
def framework(folder: str) -> Any:
    """A framework's module, which was imported before ``install()``."""
    import megatron_muon

    megatron_muon.uninstall()
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("a_framework")
    finally:
        sys.path.remove(folder)
        del sys.modules["a_framework"]
        megatron_muon.uninstall()


def built(build: Any, layout: Layout, chunks: list[Any], **options: Any) -> tuple[str, bool]:
    """The refusal or the last line of the report, and whether the state is canonical."""
    from megatron_muon import ConfigError
    from megatron_muon.plugin.canonical_state import is_canonical

    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            optimizer = build(harness.optimizer_config(layout, **options), chunks)
        except ConfigError as error:
            return str(error), False
    return (said.getvalue().strip().splitlines() or [""])[-1], is_canonical(optimizer)


def built_each_way(folder: str) -> dict[str, tuple[str, bool]]:
    import megatron_muon

    layout = Layout()
    with framework(folder) as module:
        layout.initialize()
        chunks = harness.wrap(harness.build_model(layout, qk_clip=True, qk_clip_threshold=5), layout)
        megatron_muon.install()
        ways = {
            "name": module.get_megatron_optimizer,
            "alias": module.build,
            "old": module.OLD[0],
            "table": module.TABLE["megatron"],
            "partial": module.bound,
            "default": module.by_default,
            "inner": module.inner,
        }
        return {name: built(build, layout, chunks) for name, build in ways.items()}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "a_framework.py").write_text(FRAMEWORK)
    return str(tmp_path)


def test_copies_in_a_framework(pool: RankPool, folder: str) -> None:
    """By a name in a module they are found; in an object, they stop all ranks, which know what they would miss."""
    first, second = pool.run(built_each_way, 2, folder)
    for way in ("name", "alias", "old"):
        assert first[way] == (
            "hooks, as observed: checkpoints canonical; QK-clip clips in the step; numbers and losses recorded where "
            "megatron.training.training.train is the loop",
            True,
        )
        assert second[way] == ("", True)
    for way in ("table", "partial", "default", "inner"):
        assert first[way] == second[way]
        assert first[way][0].startswith("The optimizer is built past megatron_muon's hooks on megatron.core.optimizer.")


def observed_otherwise() -> list[str]:
    """The line without Megatron's loop, with a file for the recorder, and after others have replaced functions."""
    import megatron.training.training as training

    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer

    layout = Layout()
    layout.initialize()
    chunks = harness.wrap(harness.build_model(layout), layout)
    del sys.modules[training.__name__]
    files: tuple[dict[str, str], ...] = ({}, {"muon_log_jsonl": "run.jsonl"})
    lines = [built(get_megatron_optimizer, layout, chunks, **options)[0] for options in files]
    sys.modules[training.__name__] = training
    ours, training.training_log = training.training_log, lambda *args: None
    lines.append(built(get_megatron_optimizer, layout, chunks)[0])
    training.training_log = ours
    return lines


def test_what_does_not_hold_is_said(pool: RankPool) -> None:
    other_loop, file, replaced = pool.run(observed_otherwise, 1)[0]
    told = "the recorder is not called by this training loop: megatron.training.training is not there"
    assert other_loop == f"hooks, as observed: checkpoints canonical; QK-clip off; {told}"
    assert file == (
        "hooks, as observed: checkpoints canonical; QK-clip off; WARNING --muon-log-jsonl run.jsonl is not written, "
        + told
    )
    assert replaced.endswith(
        "; WARNING replaced by other code, so that they need not hold: megatron.training.training:training_log"
    )


RATES = {"lr": 0.001, "min_lr": 0.001}


def rates_of(predicate: Any, layout: Layout, model: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Rates by weight of a run that gives Muon's weights another, and what the report says of them."""
    from megatron.core.optimizer import ParamKey, get_standard_config_overrides

    from megatron_muon.plugin.optimizer_state import param_states
    from megatron_muon.routing import global_names

    key = ParamKey(predicate=predicate)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        config = harness.optimizer_config(layout, **RATES)
        overrides = {**get_standard_config_overrides(config), key: {"max_lr": 0.01, "min_lr": 0.01}}
        run = harness.start(layout, optimizer={**RATES, **options}, overrides=overrides, **model)
    names = {param: name for chunk in run.chunks for name, param in global_names(chunk)}
    rates = {names[each.param]: each.group["max_lr"] for each in param_states(run.optimizer) if each.group}
    lines = said.getvalue().splitlines()
    found = [line for line in lines if "learning rate" in line]
    return {"rates": rates, "lines": found}


def rates_each_way(folder: str) -> dict[str, dict[str, Any]]:
    from megatron.core.optimizer import ParamPredicate

    import megatron_muon

    with framework(folder) as module:
        megatron_muon.install()
        matrix = ParamPredicate(name="by hand", fn=lambda param: param.dim() == 2)
        layout = Layout()
        return {
            "copy": rates_of(module.PREDICATE, layout, GDN),
            "partial": rates_of(module.PARTIAL, layout, GDN),
            "late": rates_of(module.LATE(), Layout(), GDN),
            "router": rates_of(module.PREDICATE, layout, MOE, muon_router="adam"),
            "by hand": rates_of(matrix, layout, GDN),
            "rows": rates_of(matrix, layout, GDN, muon_gdn_in_proj="split", muon_param_rule=("*word_emb*=muon",)),
            "router by hand": rates_of(matrix, layout, MOE, muon_router="adam"),
        }


OF_ADAM = ("in_proj.weight", "norm", "embedding", "output_layer", "A_log", "dt_bias", "conv1d")
MOE = {"num_layers": 1, "num_moe_experts": 2}


def test_rates_of_overrides(pool: RankPool, folder: str) -> None:
    """A rate that is keyed on Megatron-Core's predicate is Muon's alone; one that is keyed on dimensions is told."""
    found = pool.run(rates_each_way, 1, folder)[0]
    for way in ("copy", "partial", "late"):
        rates, lines = found[way]["rates"], found[way]["lines"]
        for name, rate in rates.items():
            assert rate == (0.001 if any(part in name for part in OF_ADAM) else 0.01), name
        assert lines[0] == "muon: learning rate 0.01, weight decay 0.1"
        assert all(line.startswith("adam: learning rate 0.001, weight decay 0") for line in lines[1:]), lines
    assert found["router"]["rates"]["decoder.layers.0.mlp.router.weight"] == 0.001
    assert not any("WARNING" in line for line in found["router"]["lines"])
    for way, name in (
        ("by hand", "decoder.layers.*.self_attention.in_proj.weight"),
        ("rows", "decoder.layers.*.self_attention.in_proj.weight (its rows)"),
        ("router by hand", "decoder.layers.*.mlp.router.weight"),
    ):
        warning = found[way]["lines"][-1]
        assert warning.startswith("WARNING adam updates ") and name in warning
        assert "with muon's learning rate, while its vectors have 0.001: the override that gives" in warning


def trained_past_us() -> str:
    """Megatron's loop with an optimizer that it has built itself, before ``install()``."""
    import megatron.training.training as training

    import megatron_muon
    from megatron_muon import ConfigError

    run = harness.start(Layout(), install=False)
    megatron_muon.install()
    with pytest.raises(ConfigError) as refused:
        training.train(None, run.chunks, run.optimizer, *[None] * 7)
    return str(refused.value)


def test_install_after_the_optimizer_was_built(pool: RankPool) -> None:
    """Megatron-Core's own Muon, under our name, would train without a word."""
    assert pool.run(trained_past_us, 1)[0] == (
        "--optimizer muon was built before megatron_muon.install(), by Megatron-Core itself. Call "
        "megatron_muon.install() before the model is built."
    )
