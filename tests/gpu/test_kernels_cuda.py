"""Every implementation of the products on a CUDA GPU: run with ``pytest -m gpu tests/gpu`` where there is one.

The cases are those of ``python -m tools.gpu_check --part kernels``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_muon.orthogonalize.backends import _checked
from tools.gpu_check.parts import kernels
from tools.gpu_check.report import Item, NotRunError, Report, Setting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ITEMS = kernels.items(Setting(DEVICE, time.time() + 3600, Path()))


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    _checked.cache_clear()


@pytest.mark.parametrize("item", [item for item in ITEMS if "rate" not in item.name], ids=lambda item: item.name)
def test_kernels(item: Item) -> None:
    report = Report()
    try:
        item.run(report)
    except NotRunError as error:
        pytest.skip(str(error))
    failed = [f"{what}: {text}" for what, passed, text in report.checks if not passed]
    assert report.checks and not failed, "\n".join(failed)
