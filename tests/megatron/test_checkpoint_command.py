"""``python -m megatron_muon ckpt``: inspect and convert."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_muon import cpu
from megatron_muon.checkpoint import comparison, folders, writing
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.reading import read_index
from megatron_muon.checkpoint.record import Record
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.commands import ckpt
from tests.checkpoints import contents
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_checkpoint_damage import flip_bit_of
from tests.megatron.test_checkpoint_migration import ADAM, BUFFERS, FULLY, assert_same, masters, resume, train_and_save
from tests.pool import RankPool


@pytest.fixture(autouse=True)
def a_process_of_its_own() -> Iterator[None]:
    """The command is a program: what it sets for its process is taken back."""
    yield
    cpu.uninstall()
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def muon(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon") / "iter_0000003"
    pool.run(train_and_save, 2, Layout(tp=2), {"optimizer": {"muon_master": "remainder"}}, str(folder), FULLY)
    return folder


@pytest.fixture(scope="module")
def adam(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adam") / "iter_0000003"
    pool.run(train_and_save, 2, BUFFERS, ADAM, str(folder), FULLY)
    return folder


def test_inspect(muon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt.main(["inspect", str(muon), "--contents", "--json", str(tmp_path / "found.json")])
    text = capsys.readouterr().out
    assert "decoder.layers.self_attention.linear_qkv.weight" in text and "muon (qkv: q, k, v)" in text
    assert "all numbers are finite, and tensors are what was saved" in text
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["iteration"], found["updates"]) == (3, 3)
    elements = {name: kind["elements"] for name, kind in found["kinds"].items()}
    assert elements["fp32_param"] == elements["model"] == elements["momentum_buffer"] + elements["exp_avg"]
    assert elements["exp_avg"] == elements["exp_avg_sq"]


def test_inspect_finds_what_is_wrong(pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "iter_0000003"
    pool.run(save_with_nan, 1, str(folder))
    with pytest.raises(SystemExit) as leaving:
        ckpt.main(["inspect", str(folder), "--contents"])
    assert leaving.value.code == 1
    assert "optimizer.state.momentum_buffer.decoder.layers.mlp.linear_fc2.weight has numbers that are not finite" in (
        capsys.readouterr().out
    )


def save_with_nan(folder: str) -> None:
    run = harness.start(Layout())
    run.losses(1)
    muon = next(part.optimizer for part in run.optimizer.chained_optimizers if type(part.optimizer).__name__ == "Muon")
    for chunk in run.chunks:
        for name, param in chunk.named_parameters():
            if name.endswith("layers.2.mlp.linear_fc2.weight"):
                muon.state[param]["momentum_buffer"][0, 0] = torch.nan
    harness.save_run(run, folder)


def convert(source: Path, target: Path, to: str, *, alone: bool = False, values: Sequence[str] = ()) -> str:
    """In this process; or in one of its own, as a user would."""
    words = ["convert", str(source), str(target), "--to", to, *(f"--value={value}" for value in values)]
    if alone:
        line = [sys.executable, "-m", "megatron_muon", "ckpt", *words]
        subprocess.run(line, check=True, timeout=120, capture_output=True)
    else:
        ckpt.main(words)
    assert folders.resolve(str(target)) == target / "iter_0000003"
    return str(target / "iter_0000003")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(tp=2), id="tp2", marks=pytest.mark.slow),
        pytest.param(Layout(layer_wise=True), id="layer_wise"),
    ],
)
def test_convert_adam_to_muon(pool: RankPool, adam: Path, tmp_path: Path, layout: Layout) -> None:
    """No flag is needed then, and the state is that of a switch at resume."""
    before = sorted((path.name, path.stat().st_size) for path in adam.iterdir())
    folder = convert(adam, tmp_path / "muon", "muon")
    assert before == sorted((path.name, path.stat().st_size) for path in adam.iterdir())
    losses = pool.run(resume, 2, layout, {}, folder, FULLY, str(tmp_path / "again"))[0]
    switched: dict[str, Any] = {"optimizer": {"muon_ckpt_changes": "accept"}}
    assert losses == pool.run(resume, 2, layout, switched, str(adam), FULLY, str(tmp_path / "switched"))[0]
    assert_same(contents(str(tmp_path / "again")), contents(str(tmp_path / "switched")))


def test_convert_muon_to_adam(pool: RankPool, muon: Path, tmp_path: Path) -> None:
    folder = convert(muon, tmp_path / "adam", "adam", alone=True)
    again = str(tmp_path / "again")
    pool.run(resume, 2, BUFFERS, ADAM, folder, FULLY, again)
    assert_same(masters(str(muon)), masters(again))


NORMUON: dict[str, Any] = {"optimizer": {"name": "adaptive_muon", "adaptive_muon_moment2_method": "normuon"}}


def test_damage_of_the_source_is_found_in_what_was_converted(
    muon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is copied has the sums that it was saved with, under both names; what is estimated has none."""

    def wrong(source: Path, to: str) -> list[str]:
        converted = convert(source, tmp_path / source.parent.name / to, to)
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            ckpt.main(["inspect", converted, "--contents"])
        found = re.findall(r"(\S+ of \S+) is not what was saved", capsys.readouterr().out)
        return sorted(found)

    source, embedding = tmp_path / "source" / muon.name, "embedding.word_embeddings.weight"
    shutil.copytree(muon, source)
    flip_bit_of(f"optimizer.state.exp_avg.{embedding}", source)
    assert (wrong(muon, "muon"), wrong(muon, "adam")) == ([], [])
    assert wrong(source, "adam") == [f"exp_avg of {embedding}"]
    assert wrong(source, "muon") == [f"exp_avg of {embedding}", f"momentum_buffer of {embedding}"]


def test_convert_a_variant(pool: RankPool, tmp_path: Path) -> None:
    """NorMuon's second moments mean nothing to Adam, and start anew where a run goes back; weights are kept."""
    source, again, back = (str(tmp_path / name) for name in ("normuon/iter_0000003", "again", "back"))
    pool.run(train_and_save, 2, Layout(tp=2), NORMUON, source, FULLY)
    folder = convert(Path(source), tmp_path / "adam", "adam")
    pool.run(resume, 2, BUFFERS, ADAM, folder, FULLY, again)
    assert_same(masters(source), masters(again))
    folder = convert(Path(folder), tmp_path / "muon", "muon")
    accept = {"optimizer": {**NORMUON["optimizer"], "muon_ckpt_changes": "accept"}}
    losses = pool.run(resume, 2, Layout(tp=2), accept, folder, FULLY, back, 4)[0]
    assert_same(masters(source), masters(back))
    assert losses[-1] < losses[0]


# --- diff ------------------------------------------------------------------------------------------------------------


def store(source: Path, target: Path, key: str, offsets: tuple[int, ...] | None, value: Any) -> None:
    """A copy of a checkpoint with something else in one place."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    shutil.copytree(source, target)
    metadata = pickle.loads((target / ".metadata").read_bytes())
    place = metadata.storage_data[MetadataIndex(key, offsets and torch.Size(offsets))]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    (target / "other.distcp").write_bytes(buffer.getvalue())
    place.relative_path, place.offset, place.length = "other.distcp", 0, len(buffer.getvalue())
    (target / ".metadata").write_bytes(pickle.dumps(metadata))


def differing(*words: str) -> tuple[int, dict[str, Any]]:
    """The status of ``diff``, and all that it says."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ckpt.main(["diff", *words, "--json", f"{folder}/found"])
            status = 0
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        return status, json.loads(Path(folder, "found").read_text())


def test_diff_at_other_layouts(pool: RankPool, muon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same state, saved at TP 2, at TP 1 and layer-wise, and under Megatron-Core's names: same bits."""
    layer_wise = str(tmp_path / "layer_wise" / "iter_0000003")
    pool.run(resume, 2, Layout(layer_wise=True), {}, str(muon), FULLY, layer_wise, 0)
    convert(muon, tmp_path / "upstream", "megatron-muon", values=["weight_decay=0.1"])
    for other, peaks in ((layer_wise, 16), (str(tmp_path / "upstream"), 0)):
        status, found = differing(str(muon), other)
        assert (status, found["differences"], found["settings"]) == (0, [], [])
        assert found["compared"] == 27 * 2 + 16 + peaks + 11 * 2, "weights, masters, momenta and peaks, moments"
        assert f"{92 + peaks} weights and states compared: same bits" in capsys.readouterr().out
    status, found = differing(str(muon), layer_wise, "--fast")
    assert (status, found["compared"], found["not_read"]) == (0, 0, 108)


def test_diff_says_what_and_how_much(muon: Path, adam: Path, tmp_path: Path) -> None:
    key, other = "optimizer.state.momentum_buffer.decoder.layers.mlp.linear_fc2.weight", tmp_path / "iter_0000003"
    index = read_index(muon)
    chunk = next(chunk for chunk in index.chunks(key) if chunk.offsets[0] == 2)
    tensor = index.tensor(chunk)
    changed = tensor.clone()
    changed.view(-1)[0] += 1
    changed.view(-1)[1] = torch.nan
    store(muon, other, key, chunk.offsets, changed)
    status, found = differing(str(muon), str(other))
    whole = torch.cat([index.tensor(each).flatten() for each in index.chunks(key) if each.offsets[0] == 2]).double()
    (row,) = found["differences"]
    assert status == 1 and row["name"] == "decoder.layers.mlp.linear_fc2.weight[2]" and row["kind"] == "momentum_buffer"
    assert (row["differing"], row["elements"], row["nonfinite"]) == (2, 32 * 48, [0, 1])
    assert row["max_abs"] == pytest.approx(1, rel=1e-6)
    rest = float(whole.square().sum() - tensor.flatten()[:2].double().square().sum())
    assert row["relative_norm"] == pytest.approx((1 / (rest + float(tensor.flatten()[0] + 1) ** 2)) ** 0.5, rel=1e-4)
    assert differing(str(muon), str(other), "--fast")[0] == 0, "it compares what was saved"
    status, found = differing(str(muon), str(adam))
    kinds = {row["kind"] for row in found["differences"]}
    assert status == 1 and {"weight", "fp32_param", "momentum_buffer", "exp_avg", "exp_avg_sq"} == kinds
    only = [row for row in found["differences"] if row["kind"] == "momentum_buffer"]
    assert len(only) == 16 and all(row["elements"] == 0 and row["only"][0] > 0 == row["only"][1] for row in only)
    with_moments = differing(str(muon), str(adam), "--moments")[1]["differences"]
    assert all(row["elements"] for row in with_moments if row["kind"] == "exp_avg")
    assert differing(str(muon), str(muon), "--tolerance", "0")[0] == 0


def test_diff_with_a_tolerance_sees_what_is_not_finite() -> None:
    """In other places, or of another sign."""
    for first, second, same in (
        ([1, torch.nan, torch.inf], [1, torch.nan, torch.inf], True),
        ([1, torch.nan, 2], [torch.nan, 1, 2], False),
        ([1, torch.inf], [1, -torch.inf], False),
        ([1, torch.inf], [1, torch.nan], False),
    ):
        line = comparison._Line()
        line.add(torch.tensor(first), torch.tensor(second))
        assert line.is_same(1.0) == same


def test_fast_diff_reads_what_has_sums_that_do_not_see_order() -> None:
    """Those of checkpoints of form 1."""
    for version in (1, 2, 3):
        record = Record(1, [], [], {}, [], {"w": {"momentum_buffer": 5}}, version=version)
        stored = Stored("", {}, {}, record, False)
        assert comparison._same_sum((stored, stored), "w", "momentum_buffer") == (version > 1)


# --- what is interrupted goes on -------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_convert_goes_on_where_it_stopped(
    muon: Path, adam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it had made its folder; where a file does not fit; where there is too little space."""
    begun = tmp_path / "stopped" / muon.name
    begun.mkdir(parents=True)
    (begun / f"{writing._NOTES}.new").touch()
    words = ["convert", str(muon), str(tmp_path / "stopped"), "--to", "muon"]
    ckpt.main([*words[:2], str(tmp_path / "straight"), *words[3:]])
    straight = files(tmp_path / "straight")
    lengths = sorted(len(data) for name, data in straight.items() if name.endswith(".distcp"))
    assert len(lengths) > 2 and not [name for name in straight if "being" in name or "lengths" in name]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (lengths[-1] - 1, before[1]))
    try:
        with pytest.raises(SystemExit):
            ckpt.main([*words, "--workers", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").rglob("*.distcp")}
    assert "The same command goes on from here" in capsys.readouterr().err
    assert left and len(left) < len(lengths)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        folders.resolve(str(tmp_path / "stopped"))
    for other in (["convert", str(adam), *words[2:]], [*words[:-1], "adam"], [*words, "--value", "lr=1"]):
        with pytest.raises(SystemExit):
            ckpt.main(other)
    free = SimpleNamespace(free=lengths[-1])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(SystemExit):
        ckpt.main(words)
    assert re.search(r"stopped/iter_\d+ needs .*, and .* are free there", capsys.readouterr().err)
    free.free = 1 << 40
    monkeypatch.setattr(writing, "_EVERY_S", 0.0)
    ckpt.main(words)
    assert re.search(r"[\d.]+ KiB of [\d.]+ KiB, \d+ of \d+ files", capsys.readouterr().err)
    assert files(tmp_path / "stopped") == straight
    assert {path: path.stat().st_mtime_ns for path in left} == left, "what was finished is not written again"


def converting(words: list[str], seconds: float | None) -> float:
    """The command in a process of its own, killed after a time: how long it ran."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    process = context.Process(target=ckpt.main, args=(words,))
    start = time.monotonic()
    process.start()
    process.join(seconds)
    hit = process.is_alive()
    process.kill()
    process.join()
    assert hit or process.exitcode == 0
    return time.monotonic() - start


@pytest.mark.slow
def test_convert_is_killed(pool: RankPool, tmp_path: Path) -> None:
    """At random moments, and goes on: the files are those of a run that was not killed."""
    source, straight, killed = (tmp_path / name for name in ("source/iter_0000003", "straight", "killed"))
    pool.run(save_large, 1, str(source))
    words = ["convert", str(source), "", "--to", "adam", "--workers", "2"]
    longest = max(converting([*words[:2], str(straight / name), *words[3:]], None) for name in "ab")
    dice, hits = random.Random(3), 0
    words[2] = str(killed)
    for _ in range(12):
        converting(words, dice.uniform(0.1, 0.8) * longest)
        if (killed / "iter_0000003" / "being_converted.json").is_file():
            hits += 1
        else:
            shutil.rmtree(killed, ignore_errors=True)  # it was not begun, or it is whole
    assert hits >= 4
    if not killed.exists() or not folders.newest(killed):
        converting(words, None)
    assert files(killed) == files(straight / "a") == files(straight / "b")


def save_large(folder: str) -> None:
    data = dataclasses.replace(harness.COUNTING, vocabulary=200_000)
    run = harness.start(Layout(), data=data)
    run.losses(1)
    harness.save_run(run, folder)


# --- pickles that run code -------------------------------------------------------------------------------------------


class Bomb:
    """Read by ``pickle``, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def armed(source: Path, target: Path, place: str, bomb: Bomb) -> None:
    """A copy of a checkpoint with a bomb in its index, in what is no tensor, or in the place of a tensor."""
    if place == "index":
        shutil.copytree(source, target)
        metadata = pickle.loads((target / ".metadata").read_bytes())
        metadata.planner_data = bomb
        (target / ".metadata").write_bytes(pickle.dumps(metadata))
    elif place == "common":
        store(source, target, "common_state/shard_0_1", None, [{"bomb": bomb}])
    else:
        key = "optimizer.state.momentum_buffer.decoder.layers.mlp.linear_fc2.weight"
        store(source, target, key, (0, 0, 0), bomb)


@pytest.mark.parametrize("place", ["index", "common", "tensor"])
def test_pickles_run_nothing(muon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    source, hit = tmp_path / "iter_0000003", tmp_path / "hit"
    armed(muon, source, place, Bomb(hit))
    commands = [
        ["inspect", str(source), "--contents"],
        ["convert", str(source), str(tmp_path / "to"), "--to", "adam"],
        ["diff", str(muon), str(source)],
    ]
    for words in commands:
        with pytest.raises(SystemExit):
            ckpt.main(words)
        text = capsys.readouterr().err
        assert "names posix.mkdir, which is not among" in text and "--trust" in text and len(text.splitlines()) == 1
        assert not hit.exists()
    if place != "index":
        with pytest.raises(SystemExit):
            ckpt.main([*commands[0], "--trust"])
        lost = {"tensor": "NoneType in the place of a tensor", "common": "its plain state says nothing of it"}
        assert lost[place] in capsys.readouterr().err
    else:
        ckpt.main([*commands[0], "--trust"])
    assert hit.exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["inspect", "nowhere"], "nowhere: no checkpoint of --ckpt-format torch_dist is there"),
        (["convert", "{muon}", "{muon}", "--to", "adam"], "is not empty: give a new folder"),
    ],
)
def test_errors_in_one_line(muon: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        ckpt.main([argument.format(muon=muon) for argument in arguments])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_tracker(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        folders.resolve(str(tmp_path))
    whole = tmp_path / "iter_0000007"
    whole.mkdir()
    for name in (".metadata", "metadata.json"):
        (whole / name).write_text("{}")
    folders.write_tracker(tmp_path, "7")
    assert folders.resolve(str(tmp_path)) == whole and folders.newest(tmp_path) == 7
    folders.write_tracker(tmp_path, "8")
    with pytest.raises(CheckpointError, match="iter_0000008 is not whole"):
        folders.resolve(str(tmp_path))
