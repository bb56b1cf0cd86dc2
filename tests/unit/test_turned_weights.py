"""Weights whose own dimensions are not those of their matrices: (inputs, outputs), and experts' columns in turns.

What is expected is the same optimizer's on the matrices as weights of their own, cut by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, Muon
from megatron_muon.optimizers import fading
from megatron_muon.routing.layout import SCALAR, MatrixLayout, Section

SECTIONS = (Section("q", 6, matrix_rows=3), Section("k", 5), Section("dt", 1, SCALAR))
GATED = (Section("gate", 1), Section("up", 1))
LAYOUTS = {
    "conv1d": (MatrixLayout("whole", transposed=True), (7, 12)),
    "sections": (MatrixLayout("qkv", SECTIONS, transposed=True), (7, 24)),
    "experts": (MatrixLayout("glu", GATED, stacked=True, transposed=True), (3, 7, 10)),
    "whole experts": (MatrixLayout("experts", stacked=True, transposed=True), (3, 7, 10)),
    "turns": (MatrixLayout("LoRA B", stacked=True, turns=3), (8, 12)),
    "turns of gated": (MatrixLayout("LoRA B", (Section("gate", 4), Section("up", 4)), stacked=True, turns=3), (8, 12)),
}


def by_hand(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The matrices (outputs x inputs) of a weight, and the rows under Adam, at the end."""
    if name == "conv1d":
        return [tensor.T]
    if name == "sections":
        rows = list(tensor.T)
        heads = [rows[0:3], rows[3:6], rows[12:15], rows[15:18]]
        return [*map(torch.stack, heads), torch.stack(rows[6:11] + rows[18:23]), torch.stack([rows[11], rows[23]])]
    if name == "experts":
        return [torch.stack(list(each.T)[first::2]) for each in tensor for first in (0, 1)]
    if name == "whole experts":
        return [each.T for each in tensor]
    matrices = [torch.stack([tensor[:, column] for column in range(e, 12, 3)], 1) for e in range(3)]
    return matrices if name == "turns" else [half for each in matrices for half in (each[:4], each[4:])]


def stepped(params: list[torch.nn.Parameter], grads: list[list[torch.Tensor]], **options: Any) -> list[torch.Tensor]:
    optimizer = Muon(params, lr=0.1, weight_decay=0.1, fp32_matmul_prec="highest", **options)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        optimizer.step()
    return [param.detach() for param in params]


OPTIONS: list[dict[str, Any]] = [
    {"nesterov": True, "scale_mode": "spectral"},
    {"weight_decay_method": "l2", "scale_mode": "update_norm"},
    {"variant": "normuon"},
    {"variant": "adamuon", "weight_decay_method": "cautious"},
    {"variant": "spectral_sphere"},
    {"scale_mode": "spectral_norm"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_update_is_that_of_the_matrices_alone(name: str, options: dict[str, Any]) -> None:
    layout, shape = LAYOUTS[name]
    generator = torch.Generator().manual_seed(0)
    weight, *grads = torch.randn(4, *shape, dtype=torch.float64, generator=generator)
    param = torch.nn.Parameter(weight.clone())
    param.matrix_layout = layout
    parts = [torch.nn.Parameter(part.clone().contiguous()) for part in by_hand(name, weight)]
    if name == "sections":
        parts[-1].matrix_layout = MatrixLayout("rows", (Section("dt", 2, SCALAR),))
    (found,) = stepped([param], [[grad] for grad in grads], **options)
    expected = stepped(parts, [[part.contiguous() for part in by_hand(name, grad)] for grad in grads], **options)
    for own, other in zip(by_hand(name, found), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_that_have_only_faded_are_those_of_the_matrices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step, of rows and columns that have no gradient after the first."""
    monkeypatch.setattr(fading, "EVERY", 1)
    layout, shape = LAYOUTS[name]
    generator = torch.Generator().manual_seed(0)
    weight, *grads = torch.randn(5, *shape, dtype=torch.float64, generator=generator)
    for grad in grads[1:]:
        grad[..., 0] = grad[..., 1, :] = 0.0
    param = torch.nn.Parameter(weight.clone())
    param.matrix_layout = layout
    parts = [torch.nn.Parameter(part.clone().contiguous()) for part in by_hand(name, weight)]
    if name == "sections":
        parts[-1].matrix_layout = MatrixLayout("rows", (Section("dt", 2, SCALAR),))
    (found,) = stepped([param], [[grad] for grad in grads], momentum=0.001)
    expected = stepped(parts, [[part.contiguous() for part in by_hand(name, grad)] for grad in grads], momentum=0.001)
    for own, other in zip(by_hand(name, found), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)


def test_forms_by_rows_of_outputs_are_refused() -> None:
    param = torch.nn.Parameter(torch.zeros(8, 12, dtype=torch.bfloat16))
    param.matrix_layout = LAYOUTS["conv1d"][0]
    for options in ({"master": "remainder"}, {"momentum_dtype": "int8"}):
        with pytest.raises(ConfigError, match="8 x 12 whose rows are inputs"):
            Muon([param], **options)
