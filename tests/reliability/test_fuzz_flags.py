"""Values of ``MuonConfig`` at random: each is refused by name, or a model is built, planned and takes a step."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from megatron_muon.choices import OPTIMIZERS, VARIANTS
from megatron_muon.config import PREFIX, MuonConfig, flag
from megatron_muon.errors import ConfigError
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.reliability.fuzz import each_example

FIELDS = {field.name: field for field in dataclasses.fields(MuonConfig)}
RULES = ["*.linear_fc2.weight=adam", "*=sign", "*.linear_qkv.weight=per_head", "*linear_proj*=steps:3", "*=stiefel"]
RULES += ["*.linear_fc1.weight=steps:auto", "*=coefficients:cubic5", "output_layer*=col_norm", "nothing*=muon"]
WRONG = [None, -1, 0, True, "", "junk", math.nan, math.inf, 1e400, "2x", (), ("=",), ["a=b"], {}, 10**30, -0.0, b"adam"]
WRONG += [torch.float32, object, "steps:0", ("1,2",), ("nan,1,1",), ("*=steps:" + "9" * 30,), "0x0", "-1x4", 1.5]
ELSEWHERE = ("dry_run", "log_jsonl", "ckpt_changes")
"""What says nothing about a step."""


def good(field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    """Values that the field itself takes; of numbers, such as a step has time for."""
    check = field.metadata["check"]
    found: list[Any] = [field.default, False, True, 0, 1, 2, 3, 7, 0.0, 0.1, 0.5, 2.5, 1e-30, 1e-8, "16x2", "32x4"]
    found += re.findall(r"\w+", field.metadata["help"]) if isinstance(field.default, str) else []
    found = [value for value in found if type(value) is not bool or isinstance(field.default, bool)]
    if field.name == "param_rule":
        return st.lists(st.sampled_from(RULES), max_size=3).map(tuple)
    if field.name == "custom_coefficients":
        return st.lists(st.sampled_from(["2,-1.5,0.5", "3.4445,-4.775,2.0315", "1,0,0"]), max_size=3).map(tuple)
    return st.sampled_from([value for value in found if check(value) is None])


def values() -> st.SearchStrategy[dict[str, Any]]:
    """Some fields, most of them with good values."""
    of_one = [
        st.tuples(st.just(name), st.one_of(good(field), good(field), good(field), st.sampled_from(WRONG)))
        for name, field in FIELDS.items()
        if name not in ELSEWHERE
    ]
    return st.lists(st.one_of(of_one), max_size=6, unique_by=lambda pair: pair[0]).map(dict)


EXAMPLES = st.tuples(st.sampled_from(sorted({*OPTIMIZERS})), values(), st.booleans())


def try_each(examples: int) -> dict[str, int]:
    """How many examples were refused, and how many took a step."""
    count = {"refused": 0, "stepped": 0}
    layout = Layout()
    layout.initialize()

    def check(example: tuple[str, dict[str, Any], bool]) -> None:
        name, options, bf16 = example
        named = {PREFIX + key: value for key, value in options.items()}
        try:
            run = harness.start(layout, optimizer={"name": name, **named}, early=True, bf16=bf16, num_layers=1)
        except ConfigError as error:
            words = [flag(key) for key in options] + list(named) + ["--optimizer"]
            rules = options.get("param_rule")
            words += [rule for rule in rules if isinstance(rule, str)] if isinstance(rules, (list, tuple)) else []
            assert any(word in str(error) for word in words), str(error)
            count["refused"] += 1
            return
        run.losses(1)
        count["stepped"] += 1

    each_example(EXAMPLES, examples, check)
    return count


@pytest.mark.parametrize("examples", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_every_combination_is_refused_or_trains(pool: RankPool, examples: int) -> None:
    (count,) = pool.run(try_each, 1, examples, timeout=60 + examples)
    print(count)
    assert min(count.values()) >= examples // 10 and VARIANTS
