"""What ``docs/plain-pytorch.md`` says, done; and its example."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plain-pytorch.md").read_text()


def blocks(section: str) -> list[str]:
    """The Python of a section of the page."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture
def begun(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Names after the first section: a model, and its optimizer."""
    names: dict[str, Any] = {}
    for block in blocks("One optimizer for the whole model"):
        exec(block, names)
    assert "4.weight" in capsys.readouterr().out
    return names


def test_the_page_trains_and_saves(begun: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("Saving")
    exec(block, begun)
    assert begun["loss"].isfinite() and (tmp_path / "checkpoint.pt").exists()


def test_trainer_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example, whole and in two parts: the same losses, and weights to the bit."""
    pytest.importorskip("transformers", reason="needs Hugging Face's transformers")
    pytest.importorskip("accelerate", reason="Trainer needs Hugging Face's accelerate")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import huggingface_trainer

    losses, model = huggingface_trainer.train(6, str(tmp_path / "whole"))
    resumed = str(tmp_path / "whole" / "checkpoint-3")
    again, other = huggingface_trainer.train(6, str(tmp_path / "rest"), resumed)
    assert len(losses) == 6 and losses[-1] < losses[0] and again == losses
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
    initial = dict(huggingface_trainer.tiny_model().named_parameters())
    assert not any(torch.equal(one, initial[name]) for name, one in model.named_parameters())


def test_accelerate(begun: dict[str, Any]) -> None:
    pytest.importorskip("accelerate", reason="needs Hugging Face's accelerate")
    begun["loader"] = torch.utils.data.DataLoader(torch.randint(256, (4, 8)), 2)
    before = [param.detach().clone() for param in begun["model"].parameters()]
    for block in blocks("Accelerate"):
        exec(block, begun)
    assert not any(map(torch.equal, begun["model"].parameters(), before))
