"""What ``docs/plain-pytorch.md`` says, done; and its example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import torch

from megatron_muon import optimizer_for
from tests.pool import RankPool

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


def test_every_block_is_run() -> None:
    """By the tests below, and the numbers of other implementations by ``test_coming_from.py``."""
    sections = re.split(r"\n## (.*)\n", PAGE)
    counts = {name: text.count("```python") for name, text in zip(sections[1::2], sections[2::2], strict=True)}
    assert {name: count for name, count in counts.items() if count} == {
        "One optimizer for the whole model": 1,
        "Hugging Face Trainer": 1,
        "Accelerate": 1,
        "Lightning": 1,
        "FSDP2 and tensor parallelism": 2,
        "Fused layers": 1,
        "Coming from another Muon": 1,
        "Saving": 1,
    }


def test_the_page_trains_and_saves(begun: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("Saving")
    exec(block, begun)
    assert begun["loss"].isfinite() and (tmp_path / "checkpoint.pt").exists()


def test_fused_layers(begun: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("Fused layers")
    exec(block, begun)
    assert (table := capsys.readouterr().out).count("64 x 64") > 1
    (rule,) = re.findall(r'`param_rule=\(("qkv.*?"),\)`', PAGE)
    assert optimizer_for(begun["attention"], param_rule=(eval(rule),)).table.startswith(
        table.split("param_rule")[0][:-1]
    )


def test_trainer(begun: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="needs Hugging Face's transformers")
    pytest.importorskip("accelerate", reason="Trainer needs Hugging Face's accelerate")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import huggingface_trainer

    model = huggingface_trainer.tiny_model()
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=3, warmup_steps=1, learning_rate=9.0, **quiet)
    begun |= {"model": model, "arguments": arguments, "dataset": huggingface_trainer.Counting(64)}
    before = [param.detach().clone() for param in model.parameters()]
    (block,) = blocks("Hugging Face Trainer")
    exec(block, begun)
    begun["trainer"].train()
    assert not any(map(torch.equal, model.parameters(), before))
    rates = [group["initial_lr"] for group in begun["trainer"].optimizer.param_groups]
    assert rates == [1e-3] * 3, "the optimizer's, not those of the arguments"


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
    muon = optimizer_for(huggingface_trainer.tiny_model()).muon.param_groups[0]["param_names"]
    assert {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight"} < {*muon}
    assert not any(torch.equal(one, initial[name]) for name, one in model.named_parameters())


def test_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example trains adapters and the output layer, and nothing else."""
    for name in ("transformers", "accelerate", "peft"):
        pytest.importorskip(name, reason=f"needs Hugging Face's {name}")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import huggingface_trainer
    import lora

    losses, merged = lora.train(6, str(tmp_path))
    assert losses[-1] < losses[0] and (tmp_path / "adapter_model.safetensors").exists()
    initial = dict(huggingface_trainer.tiny_model().named_parameters())
    changed = {name for name, param in merged.named_parameters() if not torch.equal(param, initial[name])}
    adapted = {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(2) for part in "qkvo"}
    assert changed == {*adapted, "lm_head.weight"}


def test_accelerate(begun: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs Hugging Face's accelerate")
    begun["loader"] = torch.utils.data.DataLoader(torch.randint(256, (4, 8)), 2)
    before = [param.detach().clone() for param in begun["model"].parameters()]
    (block,) = blocks("Accelerate")
    exec(block, begun)
    model, accelerator = begun["model"], begun["accelerator"]
    assert not any(map(torch.equal, model.parameters(), before))
    accelerator.save_state(str(tmp_path))
    loop = block[block.index("for tokens") :]
    exec(loop, begun)
    trained = [param.detach().clone() for param in model.parameters()]
    accelerator.load_state(str(tmp_path))
    exec(loop, begun)
    assert all(map(torch.equal, model.parameters(), trained))


def lightning_trained(begun: dict[str, Any], folder: Path, epochs: int, resume: str | None = None) -> Any:
    """The task, and its trainer, after this many epochs of four steps."""
    import lightning

    exec(blocks("Lightning")[0], begun)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Sequential() for _ in range(4)), torch.nn.Linear(8, 16))
    model[0], model[2] = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 8)
    task, data = begun["Task"](model), torch.randint(16, (8, 4), generator=torch.Generator().manual_seed(1))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, gradient_clip_val=1.0, default_root_dir=folder, **quiet
    )
    trainer.fit(task, torch.utils.data.DataLoader(data, 2), ckpt_path=resume)
    return task, trainer


def test_lightning(begun: dict[str, Any], tmp_path: Path) -> None:
    """Clipped, scheduled, saved by its own callback after an epoch, and gone on with to the bit."""
    pytest.importorskip("lightning", reason="needs Lightning")
    whole, trainer = lightning_trained(begun, tmp_path / "whole", 2)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [2.5e-4] * 3
    _, first = lightning_trained(begun, tmp_path / "first", 1)
    rest, _ = lightning_trained(begun, tmp_path / "rest", 2, first.checkpoint_callback.best_model_path)
    start, _ = lightning_trained(begun, tmp_path / "start", 0)
    for (name, one), two, at_first in zip(whole.named_parameters(), rest.parameters(), start.parameters(), strict=True):
        assert torch.equal(one, two) and not torch.equal(one, at_first), name


def sharded_page(shard: bool) -> list[float]:
    """On a rank: the first section's training, gone on with under FSDP2 or not; its losses."""
    names: dict[str, Any] = {}
    (first,) = blocks("One optimizer for the whole model")
    exec(first, names)
    fsdp, clip = blocks("FSDP2 and tensor parallelism")
    made = fsdp if shard else fsdp[fsdp.index("optimizer =") :]
    exec(made, names)
    loop, losses = first[first.index("for step") :], []
    for clipped in (
        loop,
        loop.replace("    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n", indent(clip, "    ")),
    ):
        exec(clipped, names)
        losses.append(names["loss"].item())
    return losses


def test_fsdp2(pool: RankPool) -> None:
    """Two ranks with the same tokens do what one does without FSDP2, with torch's clipping and with the page's."""
    (wanted,) = pool.run(sharded_page, 1, False)
    for losses in pool.run(sharded_page, 2, True):
        assert losses == pytest.approx(wanted, abs=2e-5)  # AdamW has other sums, too


def sharded_example(steps: int, load: str, save: str) -> list[float]:
    """On a rank."""
    sys.path.insert(0, str(ROOT / "examples"))
    import plain_pytorch

    return plain_pytorch.train(steps, load, save)


def test_the_sharded_example_goes_on_with_one_rank(pool: RankPool, tmp_path: Path) -> None:
    """Two ranks save after six steps; one goes on, with the losses of two."""
    whole, _ = pool.run(sharded_example, 2, 9, "", "")
    first, _ = pool.run(sharded_example, 2, 6, "", str(tmp_path))
    (rest,) = pool.run(sharded_example, 1, 9, str(tmp_path), "")
    assert first + rest == pytest.approx(whole, abs=2e-5) and whole[-1] < whole[0]  # AdamW has other sums, too


@pytest.mark.slow
def test_the_sharded_example_by_torchrun(tmp_path: Path) -> None:
    """As its first lines say."""
    told = []
    for ranks, flags in ((2, ["--steps", "4", "--save"]), (1, ["--steps", "6", "--load"])):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(ROOT / "examples" / "plain_pytorch.py"), *flags, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        told.append(re.findall(r"step (\d+) loss ", done.stdout))
    assert told == [["0", "1", "2", "3"], ["4", "5"]]
