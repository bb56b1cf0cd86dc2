"""The search for a setting that fits, with plans that are made up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_muon.errors import ConfigError
from megatron_muon.planning import fitting
from megatron_muon.planning.accounts import ALL, GIB, MOMENTUM, MUON, PADDING, STEP, WEIGHTS, Account, Entry
from megatron_muon.planning.holding import Weight
from megatron_muon.routing.layout import WHOLE

SAVED = {
    "--use-distributed-optimizer": 2,
    "decoupled": 1,
    "remainder": 3,
    "--grad-reduce-in-bf16": 5,
    "bf16": 4,
    "int8": 6,
}
"""GiB that flags save, of 40."""


def plan(flags: Sequence[str], *, replicas: int = 1, narrow: bool = True) -> Any:
    """Made up: all that a search reads of a plan."""
    if "remainder" in flags and "bf16" in flags:
        raise ConfigError("--muon-master remainder with --muon-momentum-dtype bf16: not today. Give one.")
    left = 40 - sum(SAVED.get(flag, 0) for flag in flags)
    is_layer_wise = "--use-distributed-optimizer" in flags
    padded = GIB if is_layer_wise and "decoupled" not in flags else 0
    entries = {Entry(WEIGHTS, MUON): (left - 3) * GIB - padded, Entry(PADDING, ALL): padded}
    entries |= {Entry(STEP, ALL): 3 * GIB, Entry(MOMENTUM, MUON, True): GIB}
    load = SimpleNamespace(account=Account.of(entries))
    gradient = 2 if "--grad-reduce-in-bf16" in flags or not narrow else 4
    weight = Weight("w", (4, 4), WHOLE, element_bytes=2 if narrow else 4, gradient_bytes=gradient)
    momentum = next((flag for flag in ("bf16", "int8") if flag in flags), "auto")
    return SimpleNamespace(
        loads=[load],
        layer_wise=is_layer_wise,
        layout=SimpleNamespace(data=replicas, expert_data=replicas),
        options=SimpleNamespace(
            master="remainder" if "remainder" in flags else "fp32",
            momentum_dtype=momentum,
            offload=next((flag for flag in ("momentum", "all") if flag in flags), "none"),
            layer_wise_param_layout="decoupled" if "decoupled" in flags else "padded",
        ),
        stages=[SimpleNamespace(weights=[weight])],
    )


def search(memory: float, flags: Sequence[str] = (), activations: float = 0.0, **kind: Any) -> fitting.Fit:
    return fitting.fit(lambda its: plan(its, **kind), flags, plan(flags, **kind), memory * GIB, activations * GIB)


def tried(found: fitting.Fit) -> list[tuple[str, float]]:
    return [(" ".join(each.flags), each.device_bytes / GIB) for each in found.outcomes if not each.refused]


def test_the_first_that_fits_ends_the_search() -> None:
    assert tried(search(40)) == [("", 40)]
    found = search(38, replicas=2)
    assert tried(found) == [("", 40), ("--use-distributed-optimizer", 38)]
    assert fitting.render(found)[-1] == "Add --use-distributed-optimizer"
    assert found.plan is not None and found.outcomes[-1].host_bytes == GIB
    given = ["--use-distributed-optimizer"]
    assert tried(search(37, given, replicas=2)) == [("", 38), ("--layer-wise-param-layout decoupled", 37)]
    decoupled = [*given, "--layer-wise-param-layout", "decoupled"]
    assert tried(search(34, decoupled, replicas=2)) == [("", 37), ("--muon-master remainder", 34)]
    # Three GiB of the step are not there together with activations.
    assert tried(search(40, activations=3)) == [("", 40)] and tried(search(40, activations=4))[0] == ("", 41)


def test_what_is_refused_is_passed_over_and_told() -> None:
    found = search(27)
    assert [each.refused[:21] for each in found.outcomes if each.refused] == ["--muon-master remainder"[:21]] * 6
    assert tried(found)[-1] == ("--muon-master remainder --grad-reduce-in-bf16 --muon-momentum-dtype int8", 26)
    assert found.outcomes[-1].error == "gradients 1.7e-3 to 9.8e-3, momentum 2.4e-2, up to 0.9"
    refused = "Refused: --muon-master remainder with --muon-momentum-dtype bf16: not today. Give one."
    assert fitting.render(found).count(refused) == 1


def test_none_fits() -> None:
    found = search(1)
    names = {each.flags for each in found.outcomes}
    pairs = itertools.product(("fp32", "bf16", "int8"), ("none", "momentum", "all"), ("", "--grad-reduce-in-bf16"))
    for momentum, offload, gradients in pairs:
        given = [f"--muon-momentum-dtype {momentum}"] * (momentum != "fp32")
        given += [f"--muon-offload {offload}"] * (offload != "none")
        assert ("--muon-master remainder", *filter(None, [gradients]), *given) in names
    assert found.plan is None and not found.to_document()["fits"]
    assert "int8 takes least, 25.00 GiB too much" in fitting.render(found)[-1]


def test_errors_are_those_that_were_measured() -> None:
    """Of gradients of one micro-batch and of many, and of averages of noise and of what is worst."""
    found = json.loads((Path(__file__).parents[2] / "docs/results/momentum_dtype.json").read_text())
    noise, few, many = found["averages"]["0.95"]["noise"], *(found["gradients"][count] for count in ("1", "64"))
    worst = max(each["update"]["int8"] for each in found["zoo"].values())
    expected = {
        "gradients": ["", f"gradients {few:.1e} to {many:.1e}"],
        "momentum": [
            "",
            f"momentum {noise['bf16']['update']:.1e}",
            f"momentum {noise['int8']['update']:.1e}, up to {worst:.1f}",
        ],
    }
    for name, errors in expected.items():
        assert [level.error for level in fitting.KNOBS[name]] == [error.replace("e-0", "e-") for error in errors]


@pytest.mark.parametrize(
    ("flags", "kind", "expected"),
    [
        (
            ["--muon-momentum-dtype", "int8", "--muon-offload", "momentum"],
            {"narrow": False},
            ["", "--muon-offload all"],
        ),
        (
            ["--muon-momentum-dtype", "bf16"],
            {"narrow": False},
            [
                "",
                "--muon-offload momentum",
                "--muon-offload all",
                "--muon-momentum-dtype int8",
                "--muon-momentum-dtype int8 --muon-offload momentum",
                "--muon-momentum-dtype int8 --muon-offload all",
            ],
        ),
        (
            ["--muon-master", "remainder", "--grad-reduce-in-bf16", "--muon-momentum-dtype", "int8"],
            {},
            ["", "--muon-offload momentum", "--muon-offload all"],
        ),
    ],
)
def test_nothing_takes_more_than_what_was_given(flags: list[str], kind: dict[str, Any], expected: list[str]) -> None:
    """And float32 weights have neither remainders nor other gradients."""
    assert [flags for flags, _ in tried(search(1, flags, **kind))] == expected
