"""What users say of fused weights of their own, and what stops, or is named, until they do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from megatron_muon import ConfigError, Muon, MuonConfig, param_groups
from megatron_muon.routing.layout import MatrixLayout, Section, layout_of
from megatron_muon.routing.predicate import exclusion_reason


class Experts(torch.nn.Module):
    """Of nobody's make: two projections for each of three experts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = torch.nn.Parameter(torch.randn(3, 8, 6, generator=generator))
        self.down = torch.nn.Parameter(torch.randn(3, 8, 5, generator=generator))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 6)
        self.conv = torch.nn.Conv1d(6, 6, 3)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"experts": Experts()})])
        self.attention = torch.nn.ModuleDict({"qkv_proj": torch.nn.Linear(6, 24), "out": torch.nn.Linear(6, 6)})


STACKS = ("*.experts.up=stack", "*.experts.down=transposed_stack")
QKV = "attention.qkv_proj.weight"


def groups_of(rules: tuple[str, ...] = STACKS, model: torch.nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    model = model or Model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*several matrices")
        return model, param_groups(model, MuonConfig(param_rule=rules), **options)


def test_stacks_that_nobody_knows_stop_and_name_the_choice() -> None:
    message = (
        r"these 3-D weights, .*: layers\.0\.experts\.up \(3 x 8 x 6\), layers\.0\.experts\.down .* "
        r"param_rule=\('layers\.0\.experts\.up=stack',\) for \(experts, outputs, inputs"
    )
    with pytest.raises(ConfigError, match=message):
        param_groups(Model())
    with pytest.raises(ConfigError, match="there is: stack, adam"):
        groups_of(("*experts*=muon",))
    model, groups = groups_of(("*experts*=adam",))
    assert groups.table.splitlines()[0] == "muon updates 180 of 648 parameters (27.8%), adam the others"
    assert exclusion_reason(model.conv.weight) == "3-D"


def test_stacks_are_a_matrix_for_each_expert() -> None:
    model, groups = groups_of()
    experts = model.layers[0]["experts"]
    grads = {
        param: torch.randn(param.shape, generator=torch.Generator().manual_seed(1)) for param in experts.parameters()
    }
    alone = [[torch.nn.Parameter(each.detach().clone()) for each in param] for param in (experts.up, experts.down.mT)]
    for param, grad in grads.items():
        param.grad = grad
    for weights, grad in zip(alone, (grads[experts.up], grads[experts.down].mT), strict=True):
        for weight, own in zip(weights, grad, strict=True):
            weight.grad = own.contiguous()
    options = {"lr": 0.1, "fp32_matmul_prec": "highest", "scale_mode": "shape_scaling"}
    Muon(groups.muon, **options).step()
    Muon([{"params": [weight for weights in alone for weight in weights], "weight_decay": 0.1}], **options).step()
    for found, weights in ((experts.up, alone[0]), (experts.down.mT, alone[1])):
        torch.testing.assert_close(found.detach(), torch.stack([each.detach() for each in weights]), rtol=0, atol=1e-5)


SECTIONS = (Section("q", 12, matrix_rows=6), Section("k", 6), Section("v", 6, "scalar"))


def test_sections_are_said_by_rule_or_in_code() -> None:
    by_rule, _ = groups_of((*STACKS, f"{QKV}=split(q 12/6, k 6, v 6 adam)"))
    in_code, _ = groups_of(layouts={"*.qkv_proj.weight": SECTIONS})
    whole, _ = groups_of((*STACKS, f"{QKV}=whole"), layouts={QKV: SECTIONS})
    assert (
        layout_of(by_rule.get_parameter(QKV))
        == layout_of(in_code.get_parameter(QKV))
        == MatrixLayout("fused", SECTIONS)
    )
    assert layout_of(whole.get_parameter(QKV)).sections == ()
    model, _ = groups_of(("*.up=stack(gate 1, up 1)", STACKS[1]), layouts={QKV: MatrixLayout("qkv", SECTIONS)})
    assert layout_of(model.get_parameter(QKV)).kind == "qkv"
    up = layout_of(model.layers[0]["experts"].up)
    assert up.stacked and [(each.name, each.rows) for each in up.sections] == [("gate", 1), ("up", 1)]


@pytest.mark.parametrize(
    ("rules", "layouts", "message"),
    [
        ((f"{QKV}=split(q 5)",), None, "24 x 6, which is no 2-D weight .* periods of 5"),
        ((f"{QKV}=stack",), None, "which is no 3-D weight"),
        ((f"{QKV}=split(q)",), None, "'q': give a name and a number of rows"),
        ((f"{QKV}=split(q 6/4)",), None, "q of 6 rows in matrices of 4"),
        ((f"{QKV}=split(q 6 adam)",), None, "all rows are adam's: give the weight to adam"),
        ((), {"*.wqkv.weight": SECTIONS}, r"layouts: no trainable weight has the name '\*\.wqkv\.weight'"),
        ((), {QKV: SECTIONS[1:2] * 3}, "24 x 6, which is no 2-D weight with periods of 18 rows"),
    ],
)
def test_what_does_not_fit_is_refused(rules: tuple[str, ...], layouts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        groups_of((*STACKS, *rules), layouts=layouts)


def test_layers_that_look_fused_are_named() -> None:
    with pytest.warns(UserWarning, match=r"attention\.qkv_proj\.weight \(24 x 6\): by the name several matrices"):
        groups = param_groups(Model(), MuonConfig(param_rule=STACKS))
    assert "WARNING attention.qkv_proj.weight" in groups.table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(Model(), MuonConfig(param_rule=(*STACKS, f"{QKV}=whole")))


def test_wrappers_fall_away_in_rules_or_may_be_named() -> None:
    """As ``named_parameters()`` has the names, or as the report has them."""
    inner = torch.nn.ModuleDict({"layer": checkpoint_wrapper(torch.nn.Linear(4, 4))})
    wrapped = torch.nn.ModuleDict({"_orig_mod": inner})  # as torch.compile names it, whose import takes seconds
    raw = next(name for name, _ in wrapped.named_parameters())
    assert raw == "_orig_mod.layer._checkpoint_wrapped_module.weight"
    for name in (raw, "layer.weight", "_orig_mod.*.weight"):
        _, groups = groups_of((f"{name}=adam",), wrapped)
        assert (
            not groups.muon
            and "layer.weight" in groups.table
            and "_orig_mod" not in groups.table.split("param_rule")[0]
        )
