"""State in the one form of checkpoints, whatever form saves and reads it: other layouts, optimizers and ways."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon.checkpoint.stored import Stored
from tests.checkpoints import contents, differences
from tests.megatron import harness
from tests.megatron.crossing import AGAIN
from tests.megatron.harness import Layout
from tests.megatron.loading import TIMEOUT, Outcome, failure, one_error
from tests.megatron.test_checkpoint_damage import MOMENTUM, flip_bit_of
from tests.megatron.test_checkpoint_damage import WEIGHT as DAMAGED
from tests.pool import RankPool

TP2, DP2, LAYER_WISE = Layout(tp=2), Layout(), Layout(layer_wise=True)

FLOAT32: dict[str, Any] = {}
REMAINDERS = {"muon_master": "remainder"}
BF16 = {"muon_momentum_dtype": "bf16"}
INT8 = {"muon_momentum_dtype": "int8"}


def start(layout: Layout, form: dict[str, Any], **options: Any) -> harness.Run:
    return harness.start(layout, bf16=True, early=True, num_layers=2, optimizer={**form, **options})


# --- remainders are the masters of the same run -----------------------------------------------------------------------


def train(layout: Layout, form: dict[str, Any], steps: int, folders: list[str], loaded: str = "") -> list[float]:
    """From a checkpoint or the beginning; each folder is saved after as many steps."""
    run = start(layout, form)
    if loaded:
        harness.load_run(run, loaded)
    losses = []
    for folder in folders:
        losses += run.losses(steps)
        harness.save_run(run, folder)
    return losses


ROUTES = {
    "tp2-layer_wise": ((2, TP2), (2, LAYER_WISE)),
    "layer_wise-tp1": ((2, LAYER_WISE), (1, DP2)),
    "tp1-tp2": ((1, DP2), (2, TP2)),
}


@pytest.mark.parametrize(
    "route,steps",
    [("tp2-layer_wise", 4), *(pytest.param(route, 100, marks=pytest.mark.slow) for route in ROUTES)],
)
def test_remainders_have_the_bits_of_float32_masters(pool: RankPool, tmp_path: Path, route: str, steps: int) -> None:
    """Losses, weights, masters and momentum, through a resume in the middle at another layout."""
    found = []
    for name, form in (("float32", FLOAT32), ("remainders", REMAINDERS)):
        middle, end = str(tmp_path / name / "middle"), str(tmp_path / name / "end")
        (ranks, layout), (other_ranks, other) = ROUTES[route]
        losses = pool.run(train, ranks, layout, form, steps, [middle], timeout=300)[0]
        losses += pool.run(train, other_ranks, other, form, steps, [end], middle, timeout=300)[0]
        found.append((losses, middle, end))
    (losses, *folders), (others, *other_folders) = found
    assert losses == others and len(losses) == 2 * steps
    for folder, other_folder in zip(folders, other_folders, strict=True):
        assert differences(folder, other_folder) == []
        assert any(".fp32_param." in key for key in contents(folder))
        records = [Stored.read(each).record for each in (folder, other_folder)]
        assert all(record is not None and record.rules == records[0].rules for record in records), "names no form"


# --- every form reads every other ------------------------------------------------------------------------------------


def save(layout: Layout, form: dict[str, Any], folder: str, **options: Any) -> list[float]:
    """After three steps; the losses of the next two."""
    run = start(layout, form, **options)
    run.losses(3)
    harness.save_run(run, folder)
    return run.losses(2)


def load(layout: Layout, forms: list[dict[str, Any]], folder: str, **options: Any) -> list[tuple[list[float], str]]:
    """In each form: saved again as it was loaded; two losses, and what is said."""
    found = []
    for number, form in enumerate(forms):
        run = start(layout, form, **options)
        with contextlib.redirect_stdout(io.StringIO()) as told:
            harness.load_run(run, folder)
        harness.save_run(run, f"{folder}{AGAIN}{number}")
        found.append((run.losses(2), told.getvalue()))
    return found


def of(folder: str, state: str) -> dict[str, torch.Tensor]:
    """A state of all weights."""
    return {key.partition(f".{state}.")[2]: tensor for key, tensor in contents(folder).items() if f".{state}." in key}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and first
    for key, tensor in first.items():
        assert torch.equal(tensor.float(), second[key].float()), key


@pytest.mark.parametrize(
    "source,to",
    [
        pytest.param((2, TP2), (2, LAYER_WISE), id="tp2-layer_wise"),
        pytest.param((2, LAYER_WISE), (2, Layout(pp=2)), id="layer_wise-pp2", marks=pytest.mark.slow),
    ],
)
def test_a_state_of_one_precision_resumes_in_another(
    pool: RankPool, tmp_path: Path, source: tuple[int, Layout], to: tuple[int, Layout]
) -> None:
    """Masters are the same bits; momentum is where nothing is rounded. It is told, once, and no flag is needed."""
    for name, form, dtype in (("int8", INT8, torch.float32), ("bf16", {**REMAINDERS, **BF16}, torch.bfloat16)):
        folder = str(tmp_path / name)
        following = pool.run(save, source[0], source[1], form, folder)[0]
        momentum, others = of(folder, "momentum_buffer"), [{**REMAINDERS, **INT8}, FLOAT32, BF16]
        assert {tensor.dtype for tensor in momentum.values()} == {dtype}
        assert not any(f".{state}." in key for key in contents(folder) for state in ("master_", "momentum_scale"))
        found = pool.run(load, to[0], to[1], others, folder)
        for number, (now, exact) in enumerate((("int8", False), ("fp32", True), ("bf16", name == "bf16"))):
            losses, text = found[0][number]
            again = f"{folder}{AGAIN}{number}"
            assert losses == pytest.approx(following, abs=3e-2)
            assert_same(of(folder, "fp32_param"), of(again, "fp32_param"))
            if exact:
                assert_same(momentum, of(again, "momentum_buffer"))
            line = f"  changed by flags: muon momentum was {name}, is {now} from now on\n"
            assert text.count("momentum was") == text.count(line) == (0 if now == name else 1), text
            assert "momentum_dtype" not in text
            assert [each[number][1] for each in found[1:]] == [""] * (len(found) - 1)
            for key, tensor in of(again, "momentum_buffer").items():  # of each row, which is a block here
                largest = momentum[key].float().abs().amax(-1, keepdim=True)
                assert ((tensor.float() - momentum[key].float()).abs() <= largest / 250).all(), key
    layer = flip_bit_of(MOMENTUM, Path(folder))  # of bfloat16 numbers: before they are rounded, or become others
    outcomes = pool.run(refused, to[0], to[1], [FLOAT32, INT8], folder)
    for number in range(2):
        text = one_error([each[number] for each in outcomes])
        assert f"  momentum_buffer of {DAMAGED}[{layer}]\n" in text and text.count("momentum_buffer") == 1


def test_adam_goes_on_from_remainders_and_back(pool: RankPool, tmp_path: Path) -> None:
    folder, again, form = str(tmp_path / "a"), str(tmp_path / "a") + f"{AGAIN}0", {**REMAINDERS, **INT8}
    accept: dict[str, Any] = {"muon_ckpt_changes": "accept"}
    pool.run(save, 2, LAYER_WISE, form, folder)
    pool.run(load, 2, TP2, [FLOAT32], folder, name="adam", **accept)
    assert_same(of(folder, "fp32_param"), of(again, "fp32_param"))
    averages = {**of(folder, "exp_avg"), **of(folder, "momentum_buffer")}
    assert_same(averages, of(again, "exp_avg"))
    ((_, text),) = pool.run(load, 2, TP2, [form], again, **accept)[0]
    assert "muon momentum was fp32, is int8 from now on" in text
    assert_same(of(folder, "fp32_param"), of(f"{again}{AGAIN}0", "fp32_param"))


def refused(layout: Layout, forms: list[dict[str, Any]], folder: str) -> list[Outcome]:
    runs = [start(layout, form) for form in forms]
    return [failure(lambda run=run: harness.load_run(run, folder)) for run in runs]  # type: ignore[misc]


# --- each rank's own file (--ckpt-format torch) ----------------------------------------------------------------------


def through_files(layout: Layout, param_layout: bool) -> list[str]:
    """From each form into each: what is not the same, of masters, momentum and losses."""
    problems, saved = [], {}
    forms = {"float32": FLOAT32, "remainders": REMAINDERS, "int8": {**REMAINDERS, **INT8}}
    for name, form in forms.items():
        run = harness.start(layout, bf16=True, early=True, param_layout=param_layout, num_layers=2, optimizer=form)
        run.losses(2)
        file = io.BytesIO()
        model = [harness.unwrap(chunk).state_dict() for chunk in run.chunks]
        torch.save({"model": model, "optimizer": run.optimizer.state_dict(), "step": run.step}, file)
        saved[name] = file.getvalue(), numbers(run), run.losses(2)
    for source, name in (*((name, name) for name in forms), ("float32", "int8"), ("int8", "float32")):
        data, before, losses = saved[source]
        options = {"param_layout": param_layout, "num_layers": 2, "optimizer": forms[name]}
        run = harness.start(layout, bf16=True, early=True, seed=2, **options)
        state = torch.load(io.BytesIO(data), weights_only=False)
        for chunk, its in zip(run.chunks, state["model"], strict=True):
            harness.load_model(chunk, its)
        with contextlib.redirect_stdout(io.StringIO()) as told:
            run.optimizer.load_state_dict(state["optimizer"])
        if "master" in told.getvalue():
            problems.append(f"{source} to {name}: {told.getvalue()}")
        run.step = state["step"]
        for (key, was), (other, now) in zip(before, numbers(run), strict=True):
            is_rounded = key == "momentum_buffer" and name == "int8" != source
            if key != other or not (is_rounded or torch.equal(was, now)):
                problems.append(f"{source} to {name}: {key}")
        if name == source and run.losses(2) != losses:
            problems.append(f"{source} to {name}: losses")
    if saved["float32"][2] != saved["remainders"][2]:
        problems.append("float32 masters and remainders")
    return problems


def numbers(run: harness.Run) -> list[tuple[str, torch.Tensor]]:
    from megatron_muon.plugin.optimizer_state import param_states

    held = param_states(run.optimizer)
    return [(name, tensor.clone()) for each in held for name, tensor in sorted(each.saved.items())]


@pytest.mark.parametrize(
    "layout,param_layout",
    [(TP2, True), pytest.param(LAYER_WISE, False, marks=pytest.mark.slow)],
    ids=["tp2", "layer_wise"],
)
def test_the_format_torch(pool: RankPool, layout: Layout, param_layout: bool) -> None:
    assert pool.run(through_files, 2, layout, param_layout, timeout=TIMEOUT) == [[], []]
