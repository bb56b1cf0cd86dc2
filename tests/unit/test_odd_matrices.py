"""What comes of odd matrices: each cell of the table in the documentation, whatever type of numbers they come in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_muon.orthogonalize.coefficients import Iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from tests.iterations import error, gaussian, gram, set_of, standard
from tests.reference import orthogonalized, with_singular_values

P, Q = 24, 64
QUINTIC = set_of("quintic", 5)
HEADER = "| matrix | fp64 | fp64, Gram | fp32 | fp32, Gram | bf16 | fp16 | fp16, Gram |"
NUMBERS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def with_entry(value: float) -> torch.Tensor:
    found = gaussian(P, Q)
    found[3, 5] = value
    return found


MATRICES = {
    "zeros": torch.zeros(P, Q, dtype=torch.float64),
    "noise": gaussian(P, Q),
    "one row": gaussian(1, Q),
    "one column": gaussian(P, 1),
    "rank one": gaussian(P, 1, seed=1) @ gaussian(1, Q, seed=2),
    **{
        f"singular values from 1 to 1e-{decades}": with_singular_values(
            torch.logspace(0, -decades, P, dtype=torch.float64), P, Q
        )
        for decades in (1, 2, 4, 8, 12)
    },
    "an infinite entry": with_entry(float("inf")),
    "a NaN": with_entry(float("nan")),
}


def table() -> list[list[str]]:
    text = (Path(__file__).parents[2] / "docs" / "results" / "iteration.md").read_text()
    lines = text[text.index(HEADER) :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def iterated(x: torch.Tensor, numbers: str) -> torch.Tensor:
    """By one of the table's columns."""
    dtype, _, form = numbers.partition(", ")
    is_tall = x.size(-2) > x.size(-1)
    found = (gram if form else standard)((x.mT if is_tall else x)[None], QUINTIC, NUMBERS[dtype])[0]
    return found.mT if is_tall else found


def test_the_table_is_complete() -> None:
    assert [row[0] for row in table()[2:]] == list(MATRICES)


@pytest.mark.parametrize("column", range(1, 8))
@pytest.mark.parametrize("row", range(1, 1 + len(MATRICES)))
def test_every_cell(row: int, column: int) -> None:
    """Errors are relative, against singular values in float64 of the matrices as the type has them that they come in.

    Those of float64 are for float64: others are divided by their norm in float32.
    """
    header, *found = table()
    cell, numbers = found[row][column], header[column]
    errors = []
    for source in NUMBERS.values() if numbers[:4] != "fp64" else [torch.float64]:
        x = MATRICES[found[row][0]].to(source)
        y = iterated(x, numbers)
        if cell == "zeros":
            assert not y.any()
        elif cell == "NaN":
            assert y.isnan().all()
        else:
            errors.append(error(y, orthogonalized(x, QUINTIC)))
        if source != torch.float16:  # which has no such numbers
            for exponent in (-90, 90):
                assert torch.equal(iterated(x * 2.0**exponent, numbers).nan_to_num(7.0), y.nan_to_num(7.0))
    assert not errors or max(errors) <= float(cell) <= 4 * max(errors)


@pytest.mark.parametrize("bad", ["an infinite entry", "a NaN"])
@pytest.mark.parametrize("dtype", NUMBERS.values())
def test_others_of_the_batch_do_not_notice(dtype: torch.dtype, bad: str) -> None:
    for shape in ((P, Q), (Q, P), (P, P)):
        each = [gaussian(*shape, seed=seed, dtype=torch.float32) for seed in range(3)]
        iteration = Orthogonalizer(Iteration(QUINTIC), dtype)
        expected = iteration(torch.stack(each))
        each[1][:P, :P] = MATRICES[bad][:, :P]
        found = iteration(torch.stack(each))
        assert found[1].isnan().all() and torch.equal(found[::2], expected[::2])
