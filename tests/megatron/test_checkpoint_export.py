"""``ckpt convert --to megatron-muon`` and ``megatron-adam``: resumed by Megatron-Core 0.19.2 without this package."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon import cpu
from megatron_muon.commands import ckpt
from tests.checkpoints import contents
from tests.launch import FLAGS, ROOT, SCRIPT, TIMEOUT, check, train
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_checkpoint_migration import ADAM, BUFFERS, FULLY, LAYER_WISE, PLAIN, TP2
from tests.megatron.test_routing import GDN, MOE
from tests.pool import RankPool

SAME: dict[str, Any] = {"optimizer": {"muon_glu": "whole", "muon_tp_mode": "duplicated"}}
"""What Megatron-Core's Muon does as well: it does not split gate and up projections."""
IN_BFLOAT16: dict[str, Any] = {
    "optimizer": {**SAME["optimizer"], "muon_master": "remainder", "muon_momentum_dtype": "bf16"}
}
"""State in other forms, which Megatron-Core has not."""
UPSTREAM: dict[str, Any] = {"optimizer": {"muon_tp_mode": "duplicated"}}
FLOAT32 = 3e-6
"""Products and sums of other orders: 3e-7 was measured after three steps, at another tensor-parallel size too."""
BFLOAT16 = 4e-3
"""Weights that are rounded otherwise where they are divided otherwise: 7e-4 was measured."""


@pytest.fixture(autouse=True)
def a_process_of_its_own() -> Iterator[None]:
    yield
    cpu.uninstall()
    logging.disable(logging.NOTSET)


def save_and_go_on(layout: Layout, folder: str, bf16: bool, options: dict[str, Any]) -> list[float]:
    run = harness.start(layout, bf16=bf16, **options)
    run.losses(3)
    harness.save_run(run, folder, FULLY)
    return run.losses(3)


def resume(layout: Layout, folder: str, bf16: bool, options: dict[str, Any], ours: bool) -> list[float]:
    """Load, save as it was loaded, and train on."""
    import megatron_muon

    run = harness.start(layout, bf16=bf16, install=ours, **options)
    assert megatron_muon.is_installed() == ours
    assert ours or "megatron_muon" not in type(run.optimizer).load_state_dict.__module__
    harness.load_run(run, folder, FULLY)
    harness.save_run(run, f"{folder}-again", FULLY)
    return run.losses(3)


def export(source: Path, to: str, *values: str) -> str:
    target = source.parent.parent / to
    words = [word for value in ("weight_decay=0.1", *values) for word in ("--value", value)]
    ckpt.main(["convert", str(source), str(target), "--to", to, *words])
    return str(target / source.name)


def check_states(before: dict[str, torch.Tensor], again: str, *states: str) -> None:
    """What Megatron-Core has loaded and saved again is what was there, bit for bit, by either name of a master."""
    after = contents(again)
    for key, value in after.items():
        if ".exp_avg_sq." in key and "exp_avg_sq" not in states:
            continue
        names = [key.replace(".state.param.", ".state.fp32_param."), key.replace(".exp_avg.", ".momentum_buffer.")]
        names += [key, key.removeprefix("optimizer.state.param.")]
        found = next(name for name in names if name in before)
        assert torch.equal(value, before[found].to(value.dtype)), key
    for state in states:
        wanted = {key for key in before if f".{state}." in key}
        assert wanted <= after.keys()


@pytest.mark.parametrize(
    "bf16,source,to",
    [
        pytest.param(False, PLAIN, TP2, id="float32-dp2-to-tp2"),
        pytest.param(True, TP2, LAYER_WISE, id="bfloat16-tp2-to-layer_wise"),
        pytest.param(True, TP2, TP2, id="bfloat16-tp2-to-tp2", marks=pytest.mark.slow),
        pytest.param(True, LAYER_WISE, PLAIN, id="bfloat16-layer_wise-to-dp2", marks=pytest.mark.slow),
        pytest.param(False, TP2, PLAIN, id="float32-tp2-to-dp2", marks=pytest.mark.slow),
    ],
)
def test_muon(
    pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str], bf16: bool, source: Layout, to: Layout
) -> None:
    folder = tmp_path / "ours" / "iter_0000003"
    wanted = pool.run(save_and_go_on, 2, source, str(folder), bf16, IN_BFLOAT16 if bf16 else SAME)[0]
    new = export(folder, "megatron-muon")
    assert "cannot have" not in capsys.readouterr().out
    got = pool.run(resume, 2, to, new, bf16, UPSTREAM, False)[0]
    assert got == pytest.approx(wanted, rel=0, abs=BFLOAT16 if bf16 else FLOAT32)
    states = ("momentum_buffer", "exp_avg", "exp_avg_sq", *(["fp32_param"] if bf16 and not to.layer_wise else []))
    check_states(contents(str(folder)), f"{new}-again", *states)


@pytest.mark.parametrize(
    "bf16,source,to",
    [
        pytest.param(True, TP2, BUFFERS, id="bfloat16-tp2-to-distributed_optimizer"),
        pytest.param(False, PLAIN, TP2, id="float32-dp2-to-tp2", marks=pytest.mark.slow),
        pytest.param(False, TP2, BUFFERS, id="float32-tp2-to-distributed_optimizer", marks=pytest.mark.slow),
        pytest.param(True, LAYER_WISE, TP2, id="bfloat16-layer_wise-to-tp2", marks=pytest.mark.slow),
    ],
)
def test_adam(
    pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str], bf16: bool, source: Layout, to: Layout
) -> None:
    """As with this package from ``--to adam``, bit for bit: the same state, and the same optimizer."""
    folder = tmp_path / "ours" / "iter_0000003"
    pool.run(save_and_go_on, 2, source, str(folder), bf16, IN_BFLOAT16 if bf16 else {})
    new = export(folder, "megatron-adam")
    assert "by adam there, second moments estimated: decoder.layers.mlp.linear_fc1.weight" in capsys.readouterr().out
    ckpt.main(["convert", str(folder), str(tmp_path / "adam"), "--to", "adam"])
    wanted = pool.run(resume, 2, to, str(tmp_path / "adam" / folder.name), bf16, ADAM, True)[0]
    assert pool.run(resume, 2, to, new, bf16, ADAM, False)[0] == wanted
    assert {tensor.dtype for key, tensor in contents(new).items() if ".exp_avg_sq." in key} == {torch.float32}
    check_states(contents(str(folder)), f"{new}-again")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adam"])
def test_experts(pool: RankPool, tmp_path: Path, name: str) -> None:
    """Megatron-Core has optimizers of their own for experts that are divided, and reads them as they were saved."""
    folder, layout = tmp_path / "ours" / "iter_0000003", Layout(ep=2)
    wanted = pool.run(save_and_go_on, 2, layout, str(folder), True, {**SAME, **MOE})[0]
    with pytest.raises(SystemExit):
        export(folder, f"megatron-{name}")
    new = export(folder, f"megatron-{name}", "expert_model_parallel_size=2")
    options = UPSTREAM if name == "muon" else ADAM
    got = pool.run(resume, 2, layout, new, True, {**options, **MOE}, False)[0]
    assert got[0] == wanted[0]
    check_states(contents(str(folder)), f"{new}-again")


def save_with_rows_under_adam(folder: str) -> None:
    run = harness.start(Layout(), **GDN, optimizer={"muon_gdn_in_proj": "split"})
    run.losses(1)
    harness.save_run(run, folder, FULLY)


def test_rows_under_adam_inside_a_muon_weight(pool: RankPool, tmp_path: Path) -> None:
    """Their second moments stay, and Muon's rows, which have none, get an estimate and not zeros."""
    folder = tmp_path / "ours" / "iter_0000003"
    pool.run(save_with_rows_under_adam, 1, str(folder))
    ckpt.main(["convert", str(folder), str(tmp_path / "adam"), "--to", "adam"])
    before = contents(str(folder))
    for new in (str(tmp_path / "adam" / folder.name), export(folder, "megatron-adam")):
        after = contents(new)
        names = [
            key for key in before if ".exp_avg_sq." in key and key.replace("exp_avg_sq", "momentum_buffer") in before
        ]
        assert names
        for key in names:
            there, average = before[key] != 0, before[key.replace("exp_avg_sq", "momentum_buffer")]
            assert there.any() == key.endswith((".alpha", ".beta")), "Muon's rows have none"
            assert torch.equal(after[key][there], before[key][there])
            if not there.any():
                expected = torch.full_like(average, average.double().square().mean().item() * 1.95 / 0.05)
                torch.testing.assert_close(after[key], expected, rtol=1e-5, atol=0)
            assert torch.equal(after[key.replace("exp_avg_sq", "exp_avg")], average)


@pytest.mark.slow
def test_megatrons_own_script(tmp_path: Path) -> None:
    """A run of ``megatron.training`` stops with this package and goes on without: all comes from its arguments."""
    flags = ["--train-iters", "6", "--bf16", "--tensor-model-parallel-size", "2"]
    muon = ["--muon-tp-mode", "duplicated", "--muon-extra-scale-factor", "0.2"]
    saves = ["--save", str(tmp_path / "ours"), "--save-interval", "3", "--muon-glu", "whole"]
    wanted = train(*flags, *muon, *saves, log=tmp_path / "log")[3:]
    for name, more in (("muon", muon), ("adam", ["--use-distributed-optimizer"])):
        new = tmp_path / name
        ckpt.main(["convert", str(tmp_path / "ours" / "iter_0000003"), str(new), "--to", f"megatron-{name}"])
        script = Path(__file__).parent / "scripts" / "on_cpu.py"
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        line += [str(SCRIPT), *FLAGS.split(), *flags, *more, "--optimizer", name, "--load", str(new)]
        result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        found = re.findall(r"iteration +(\d)/.*lm loss: ([\dE.+-]+)", check(result))
        assert [number for number, _ in found] == ["4", "5", "6"]
        assert float(found[0][1]) == pytest.approx(wanted[0], rel=1e-6), "of the weights alone"
        # The second that Megatron prints is the mean of two.
        assert float(found[2][1]) == pytest.approx(wanted[2], abs=1e-3 if name == "muon" else 1e-2)


def test_what_is_lost_is_told(pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A variant's state, another split, another rate, a matrix under Adam; and what is not told must be given."""
    folder = tmp_path / "ours" / "iter_0000003"
    options = {
        "optimizer": {
            "name": "adaptive_muon",
            "adaptive_muon_moment2_method": "normuon",
            "muon_qkv": "per_head",
            "muon_scalar_lr": 0.003,
            "muon_param_rule": ["*layers.1.mlp.linear_fc2.weight=adam"],
        }
    }
    pool.run(save_and_go_on, 1, Layout(), str(folder), True, options)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        ckpt.main(["convert", str(folder), str(tmp_path / "new"), "--to", "megatron-muon"])
    assert "does not tell lr of the run that is to read it: add --value lr=NUMBER" in capsys.readouterr().err
    new = export(folder, "megatron-muon", "lr=0.01")
    text = capsys.readouterr().out
    for line in (
        "normuon_moment2, a state that Megatron-Core has not: decoder.layers.mlp.linear_fc1.weight",
        "by head) here, by muon (q, k, v) there: decoder.layers.self_attention.linear_qkv.weight",
        "learning rates [0.003, 0.01] of param groups: there is one, 0.01",
        "second moments of what is updated by adam here, by muon there: decoder.layers.mlp.linear_fc2.weight",
    ):
        assert line in text, text
    assert len(pool.run(resume, 1, Layout(), new, True, UPSTREAM, False)[0]) == 3
    before, after = contents(str(folder)), contents(f"{new}-again")
    whole = after["optimizer.state.momentum_buffer.decoder.layers.mlp.linear_fc2.weight"]
    name = "decoder.layers.mlp.linear_fc2.weight@{}"
    for layer in range(4):
        state = "exp_avg" if layer == 1 else "momentum_buffer"
        assert torch.equal(whole[layer], before[f"optimizer.state.{state}.{name.format(layer)}"])
