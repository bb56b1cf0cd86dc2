"""What users of plain PyTorch do wrong, told in the words of Python: no message names a flag."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_muon import MuonConfig, Section, optimizer_for, param_groups
from megatron_muon.errors import in_python


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv = nn.Embedding(11, 4), nn.Linear(4, 12)
        self.gate = nn.Parameter(torch.ones(4, 4))
        self.head = nn.Linear(12, 11, bias=False)


ROUTES = ("gate=adam", "head.weight=adam", "qkv.weight=whole")


def made(*rules: str, **options: Any) -> Any:
    return optimizer_for(Model(), param_rule=(*ROUTES, *rules), **options)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "parameters": (
        lambda: optimizer_for(Model().parameters()),
        "^generator in place of a model: give the torch.nn.Modu",
    ),
    "betas": (
        lambda: made(betas=(0.9, 0.95)),
        r"^optimizer_for\(betas=...\): it is AdamW's; give adam=\{'betas': ...\}",
    ),
    "adam": (lambda: made(adam=3e-4), r"^optimizer_for\(adam=0.0003\): give arguments of AdamW, such as adam=\{'lr'"),
    "lr": (lambda: made(lr="1e-3"), "^lr '1e-3': give a finite number"),
    "momentum": (lambda: made(momentum="0.9"), "^momentum '0.9': give a number"),
    "steps": (lambda: made(num_ns_steps="5"), "^num_ns_steps '5': give a whole number"),
    "rule": (
        lambda: made("hed.weight=adam"),
        r"^param_rule=\('hed.weight=adam',\): no .* \(did you mean 'head.weight'\?\)",
    ),
    "text": (lambda: optimizer_for(Model(), param_rule="gate=adam"), "^param_rule gate=adam: give a list"),
    "vector": (lambda: made("qkv.bias=muon"), "^param_rule qkv.bias=muon: qkv.bias has shape 12"),
    "choice": (
        lambda: made("qkv.weight=split"),
        r"^qkv.*, param_rule qkv.weight=split is asked .* param_rule=\('qkv.we",
    ),
    "router": (lambda: made(router="sgd"), "^router sgd: choose one of muon, adam"),
    "unknown": (
        lambda: optimizer_for(Model()),
        r"gate \(4 x 4\).* param_rule=\('gate=muon',\) or 'gate=adam' .*unknown_2d m",
    ),
    "sections": (
        lambda: made(layouts={"qkv.weight": (4, 4, 4)}),
        r"^layouts: qkv.weight has \(4, 4, 4\): give a seq.*Section",
    ),
    "layer": (
        lambda: made(layouts={"head.wieght": (Section("q", 4),)}),
        r"^layouts: no .* \(did you mean 'head.weight'\?\)",
    ),
    "groups": (
        lambda: param_groups(Model(), MuonConfig(param_rule=("gat=adam", "gate=adam"))),
        r"^param_rule=\('gat=adam',\): no ",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    wrong, message = MISTAKES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError), match=message) as error:
            wrong()
    assert not re.search("--[a-z]", str(error.value))


def test_what_is_added_and_stepped() -> None:
    """After the optimizer was made, too."""
    model = Model()
    model.qkv.requires_grad_(False)
    optimizer = optimizer_for(model, param_rule=(*ROUTES[:1], "head.weight=muon"))
    model.experts = nn.Parameter(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"param_rule=\('experts=stack',\)"):
        optimizer.add_param_group({"params": [model.experts]})


def test_the_table_and_its_warnings() -> None:
    model = Model()
    with pytest.warns(UserWarning) as told:
        table = param_groups(model, MuonConfig(param_rule=ROUTES[:1], unknown_2d="adam")).table
    assert {each.filename for each in told} == {__file__}, "of who has called"
    fused, output = (str(each.message) for each in told)
    assert "layouts={'qkv.weight': (Section('q', 64), ...)}, or param_rule=('qkv.weight=split(q 64, " in fused
    assert output.startswith("head.weight (11 x 12) is the last linear layer") and "('head.weight=adam',)" in output
    assert "adam       param_rule gate=adam\n" in re.sub(" +\n", "\n", table) and not re.search("--[a-z]", table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = optimizer_for(model, param_rule=ROUTES)
    assert "adam       param_rule head.weight=adam\n" in re.sub(" +\n", "\n", optimizer.table)
    model.head.weight = nn.Parameter(torch.ones(12, 12))  # no output for each row of a table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model, MuonConfig(param_rule=("gate=adam", "qkv.weight=whole")))


def test_words() -> None:
    said = (
        "use --muon-tp-mode auto, --adaptive-muon-moment2-method normuon or --muon-param-rule 'a.*=whole' (a - b -- c)"
    )
    assert in_python(said) == "use tp_mode auto, variant normuon or param_rule=('a.*=whole',) (a - b -- c)"
