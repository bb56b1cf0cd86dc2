"""Checkpoints in object stores, by Megatron-Core's own way to them: multi-storage-client, with a store of files."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from megatron.core.msc_utils import MultiStorageClientFeature

from megatron_muon.checkpoint import folders
from megatron_muon.checkpoint.errors import CheckpointError
from tests.checkpoints import differences
from tests.launch import train
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.loading import FINE, TIMEOUT, Outcome, failure, one_error
from tests.megatron.test_checkpoint_safety import BOTH, GARBLED, make_folders, read_tracker
from tests.megatron.test_interrupted_saves import check as check_trials
from tests.megatron.test_interrupted_saves import trials
from tests.pool import RankPool

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("multistorageclient") is None, reason="multi-storage-client is not installed"
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The folder of a store, of which the profile has the folder's name."""
    root = tmp_path / f"store-{tmp_path.name}"
    root.mkdir()
    provider = {"type": "file", "options": {"base_path": str(root)}}
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": {root.name: {"storage_provider": provider}}}))
    return root


def with_stores[**P, T](store: Path, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call in a process for which object stores are enabled as by ``--enable-msc``."""
    MultiStorageClientFeature.enable()
    try:
        with mock.patch.dict(os.environ, MSC_CONFIG=str(store.parent / "msc.json")):
            return function(*args, **kwargs)
    finally:
        MultiStorageClientFeature.disable()


@pytest.mark.parametrize("url", ["msc://store/run", Path("msc://store/run"), "s3://bucket/run"])
def test_a_url_is_no_local_folder(url: Any) -> None:
    with pytest.raises(CheckpointError, match=r"(msc|s3):/.*/run is in an object store: The (MSC|multistorage)"):
        folders.path_of(url)


def places(store: Path) -> Iterator[tuple[Path, Path]]:
    """What is asked for, and the folder that has it: local, by a URL, and as ``Path`` leaves a URL."""
    url = f"msc://{store.name}/run"
    yield folders.path_of(store.parent / "run"), store.parent / "run"
    for text in (url, Path(url)):
        assert str(folders.path_of(text)) == url
        yield folders.path_of(text), store / "run"


def look_and_forget(store: Path) -> None:
    for root, there in places(store):
        assert (folders.newest(root), folders.tracked(root), folders.sizes_in(root)) == (None, None, {})
        there.mkdir(exist_ok=True)
        make_folders(there, {3: BOTH, 4: BOTH, 20: BOTH[:1]})
        folders.write_tracker(root, "4")
        assert sorted(path.name for path in there.iterdir() if path.is_file()) == [folders.TRACKER]
        assert folders.sizes_in(root / "iter_0000004") == {"__0_0.distcp": 4, ".metadata": 2, "metadata.json": 2}
        assert folders.resolve(str(root)) == root / "iter_0000004"
        assert (folders.newest(root), folders.interruption(root)) == (4, None)
        folders.forget(root / "iter_0000004")
        assert folders.newest(root) == 3 and "being written over" in str(folders.interruption(root))
        for path in sorted(there.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


@needs_client
def test_the_same_questions_have_the_same_answers(store: Path) -> None:
    with_stores(store, look_and_forget, store)


def save_and_resume(store: Path) -> tuple[list[Outcome], list[bool], list[float], list[float]]:
    """Save locally and in the store, and in the store once more; resume from there.

    Returns:
        what loading gives: as it was saved, damaged in two ways, and when the tracker of its folder says nothing.
    """
    import megatron_muon

    megatron_muon.install()
    url, local = f"msc://{store.name}/iter_0000001", store.parent / "local"
    forms = {"bf16": True, "optimizer": {"muon_master": "remainder", "muon_momentum_dtype": "bf16"}}
    run = harness.start(Layout(layer_wise=True), **forms)
    run.losses(1)
    with_stores(store, harness.save_run, run, url)
    run.losses(1)
    with_stores(store, harness.save_run, run, Path(url))
    whole = [with_stores(store, lambda: folders.is_whole(folders.path_of(url)))]
    harness.save_run(run, str(local))
    straight = run.losses(2)
    run = harness.start(Layout(layer_wise=True), **forms)
    found = [failure(lambda: with_stores(store, harness.load_run, run, Path(url)))]
    resumed = run.losses(2)
    data = sorted((store / "iter_0000001").glob("*.distcp"))[-1]
    content = data.read_bytes()
    for damage in (lambda: data.write_bytes(content[:-1]), data.unlink):
        if dist.get_rank() == 0:
            damage()
        dist.barrier()
        found.append(failure(lambda: with_stores(store, harness.load_run, run, url)))
    return found, whole, straight, resumed


@needs_client
def test_saved_over_and_resumed(pool: RankPool, store: Path) -> None:
    """Two ranks; a save over another, both by a URL and by the ``Path`` that frameworks make of it."""
    results = pool.run(save_and_resume, 2, store, timeout=TIMEOUT)
    for (fine, *_), whole, straight, resumed in results:
        assert fine == FINE and whole == [True]
        assert resumed == straight
    cut, lost = (one_error([outcomes[number] for outcomes, *_ in results]) for number in (1, 2))
    for text, words in ((cut, r" bytes of "), (lost, "is missing")):
        assert f"msc://{store.name}/iter_0000001" in text and "__1_0.distcp" in text and words in text, text


@needs_client
def test_tracker_that_names_nothing(pool: RankPool, store: Path) -> None:
    make_folders(store, {1: BOTH, 3: BOTH, 20: (), 21: BOTH[:1], 22: BOTH[1:]})
    (store / folders.TRACKER).write_bytes(GARBLED["empty"])
    tracker = f"msc://{store.name}/{folders.TRACKER}"
    assert pool.run(with_stores, 2, store, read_tracker, tracker, timeout=TIMEOUT) == [(3, False)] * 2


@needs_client
@pytest.mark.slow
def test_runs_that_live_in_a_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved in the foreground and in the background, resumed, and saved elsewhere."""
    monkeypatch.setenv("MSC_CONFIG", str(store.parent / "msc.json"))
    log = store.parent / "log.jsonl"
    whole = train("--train-iters", "6", log=store.parent / "whole.jsonl")
    url, common = f"msc://{store.name}", ["--enable-msc", "--save-interval", "1", "--train-iters", "6"]
    background = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    for name, ways in (("plain", []), ("background", background)):
        log.unlink(missing_ok=True)
        flags = ["--save", f"{url}/{name}", *common, *ways]
        train(*flags, "--exit-interval", "3", log=log)
        assert train(*flags, "--load", f"{url}/{name}", log=log) == whole
    local = str(store.parent / "local")
    flags = ["--load", f"{url}/plain", "--save", local, "--ckpt-step", "4", *common]
    assert train(*flags, log=store.parent / "elsewhere.jsonl") == whole[4:]
    for iteration in (5, 6):
        first, second = (str(root / f"iter_{iteration:07d}") for root in (Path(local), store / "background"))
        assert differences(first, second) == []


@needs_client
@pytest.mark.slow
def test_killed_while_saving_to_a_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSC_CONFIG", str(store.parent / "msc.json"))
    report = trials(store, 4, 1, "--enable-msc", limit=240)
    check_trials(report, 4)
