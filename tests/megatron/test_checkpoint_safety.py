"""Checkpoints that are damaged, interrupted or written in other ways: a clear error or the same tensors, no third."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_muon.checkpoint import folders
from tests.checkpoints import differences
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import MOE
from tests.pool import RankPool

TIMEOUT = 60
"""Seconds until a call counts as hanging; loading takes one or two."""

WEIGHT = "decoder.layers.mlp.linear_fc1.weight"
MOMENTUM = f"optimizer.state.momentum_buffer.{WEIGHT}"


def save_after_a_step(layout: Layout, options: dict[str, Any], *names: str) -> None:
    """Train a step before each save."""
    run = harness.start(layout, **options)
    for name in names:
        run.losses(1)
        harness.save_run(run, name)


def failure(function: Callable[[], object]) -> tuple[str, str]:
    """Type and text of what a function raises; empty if it does not."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def load_and_report(layout: Layout, options: dict[str, Any], folder: str) -> tuple[str, str]:
    run = harness.start(layout, **options)
    return failure(lambda: harness.load_run(run, folder))


def hashes(folder: Path) -> dict[str, str]:
    """Of every file."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def one_error(results: list[tuple[str, str]]) -> str:
    """The text of the error that all ranks have raised."""
    assert {name for name, _ in results} == {"CheckpointError"}, results
    assert len({text for _, text in results}) == 1, results
    return results[0][1]


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> str:
    path = sorted(folder.glob("*.distcp"))[-1]
    path.write_bytes(path.read_bytes()[:-4096])
    return path.name


def lose_data(folder: Path) -> str:
    path = sorted(folder.glob("*.distcp"))[-1]
    path.unlink()
    return path.name


def flip_bit(folder: Path) -> str:
    """Of the momentum of one layer."""
    return f"momentum_buffer of {WEIGHT}[{flip_bit_of(MOMENTUM, folder)}]"


def flip_bit_of_weight(folder: Path) -> str:
    """Of one layer, of which float32 runs have no other copy."""
    return f"weight {WEIGHT}[{flip_bit_of(WEIGHT, folder)}]"


def flip_bit_of(key: str, folder: Path) -> int:
    """The lowest bit of one number; the layer."""
    from megatron_muon.checkpoint.reading import read_index

    index = read_index(folder)
    chunk = next(index.chunks(key))
    numbers = index.tensor(chunk).reshape(-1).view(torch.uint8).numpy().tobytes()
    place = index.bytes_of(chunk.info).index(numbers) + len(numbers) // 8 * 4
    path = folder / chunk.info.relative_path
    data = bytearray(path.read_bytes())
    data[chunk.info.offset + place] ^= 1
    path.write_bytes(data)
    return chunk.offsets[0]


def lose_index(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return ".metadata"


def garble_index(folder: Path) -> str:
    (folder / ".metadata").write_bytes(b"\x00 no index \xff" * 100)
    return ".metadata"


def cut_index(folder: Path) -> str:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:-100])
    return ".metadata"


def lose_mark(folder: Path) -> str:
    (folder / "metadata.json").unlink()
    return "metadata.json"


def empty_mark(folder: Path) -> str:
    (folder / "metadata.json").write_text("")
    return "metadata.json"


def garble_common(folder: Path) -> str:
    """What is no tensor."""
    from megatron_muon.checkpoint.reading import read_index

    index = read_index(folder)
    info = next(info for key, info in index.metadata.storage_data.items() if "common_state" in key.fqn)
    overwrite(folder, info)
    return "common_state"


def lose_tensor(folder: Path) -> str:
    """The storage has zeros where the momentum of one layer was."""
    from megatron_muon.checkpoint.reading import read_index

    index = read_index(folder)
    overwrite(folder, next(index.chunks(MOMENTUM)).info)
    return "what is stored"


def overwrite(folder: Path, info: Any) -> None:
    """Put zeros in the place of one entry."""
    path = folder / info.relative_path
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + info.length] = bytes(info.length)
    path.write_bytes(data)


DAMAGES = [
    truncate,
    lose_data,
    flip_bit,
    flip_bit_of_weight,
    lose_index,
    garble_index,
    cut_index,
    lose_mark,
    empty_mark,
    garble_common,
    lose_tensor,
]


@pytest.fixture(scope="module")
def undamaged(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undamaged") / "iter_0000001"
    pool.run(save_after_a_step, 2, Layout(tp=2), {}, str(folder))
    return folder


def test_undamaged_checkpoint_loads(pool: RankPool, undamaged: Path) -> None:
    assert pool.run(load_and_report, 2, Layout(tp=2), {}, str(undamaged), timeout=TIMEOUT) == [("", "")] * 2


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_one_error_on_all_ranks(
    pool: RankPool, undamaged: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    folder = tmp_path / undamaged.name
    shutil.copytree(undamaged, folder)
    what = damage(folder)
    before = hashes(folder)
    text = one_error(pool.run(load_and_report, 2, Layout(tp=2), {}, str(folder), timeout=TIMEOUT))
    assert str(folder) in text and what in text and "--ckpt-step" in text, text
    assert hashes(folder) == before


FLIPS = {
    "experts_of_ep2": (2, Layout(ep=2), MOE, "decoder.layers.mlp.experts.experts.linear_fc1.weight"),
    "gate_and_up_of_tp2": (2, Layout(tp=2), {}, WEIGHT),
    "norm_of_pp2_bf16": (2, Layout(pp=2), {"bf16": True}, "decoder.layers.self_attention.linear_qkv.layer_norm_weight"),
}


@pytest.mark.parametrize("layout", [Layout(), Layout(layer_wise=True)], ids=["plain", "layer_wise"])
@pytest.mark.parametrize("case", FLIPS)
def test_flipped_bit_of_a_weight_at_another_layout(pool: RankPool, tmp_path: Path, case: str, layout: Layout) -> None:
    """Experts, fused weights and copies: sums do not depend on the layout, and see one bit."""
    ranks, source, options, key = FLIPS[case]
    folder = tmp_path / "iter_0000001"
    pool.run(save_after_a_step, ranks, source, options, str(folder))
    assert pool.run(load_and_report, 2, layout, options, str(folder), timeout=TIMEOUT) == [("", "")] * 2
    flip_bit_of(key, folder)
    text = one_error(pool.run(load_and_report, 2, layout, options, str(folder), timeout=TIMEOUT))
    (line,) = text.splitlines()[1:-1]
    assert line.strip().startswith(f"weight {key}"), text


def test_vocabulary_that_is_padded_otherwise(pool: RankPool, tmp_path: Path) -> None:
    """Megatron pads it for the tensor-parallel size: rows that only one of two runs has are no damage."""
    folder = str(tmp_path / "iter_0000001")
    for saves, loads in ((72, 64), (64, 72)):
        path = f"{folder}-{saves}"
        pool.run(save_after_a_step, 2, Layout(tp=2), {"data": harness.Data(vocabulary=saves)}, path)
        for layout in (Layout(), Layout(layer_wise=True)):
            options = {"data": harness.Data(vocabulary=loads)}
            found = pool.run(load_and_report, 2, layout, options, path, timeout=TIMEOUT)
            assert found == [("", "")] * 2


def first_look(folder: str) -> tuple[str, str]:
    """What ``megatron.training`` reads before anything else, at the start of a run."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing

    args = argparse.Namespace(ckpt_format="torch_dist", auto_detect_ckpt_format=False)

    def look() -> None:
        assert checkpointing._get_checkpoint_format(folder, args) == "torch_dist"
        dist_checkpointing.load_common_state_dict(folder)

    return failure(look)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_at_the_start_of_a_run(
    pool: RankPool, undamaged: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    """Where the run reads what is damaged, which it does not of tensors."""
    folder = tmp_path / undamaged.name
    shutil.copytree(undamaged, folder)
    assert pool.run(first_look, 2, str(folder), timeout=TIMEOUT) == [("", "")] * 2
    what = damage(folder)
    results = pool.run(first_look, 2, str(folder), timeout=TIMEOUT)
    if damage in (truncate, lose_data, flip_bit, flip_bit_of_weight, lose_tensor):
        damaged_tensors_only = results == [("", "")] * 2
        assert damaged_tensors_only or what in one_error(results)
        return
    text = one_error(results)
    assert str(folder) in text and what in text and "--ckpt-step" in text, text


# --- ranks that read different things --------------------------------------------------------------------------------


@contextlib.contextmanager
def wrong_on_rank_1(what: str) -> Iterator[None]:
    """After loading, one element of a weight or of its momentum is another number on rank 1."""
    from megatron_muon.checkpoint.canonical import Request

    original = Request.fill

    def fill(self: Request, loaded: dict[str, Any]) -> Any:
        record = original(self, loaded)
        if dist.get_rank() == 1:
            held = next(each for each in self.held if "momentum_buffer" in each.tensors)
            tensor = held.param.data if what == "weight" else held.tensors[what]
            tensor.view(-1)[3] += 1.0
        return record

    with mock.patch.object(Request, "fill", fill):
        yield


def load_wrongly(layout: Layout, options: dict[str, Any], folder: str, what: str) -> tuple[tuple[str, str], str]:
    """What is raised, and the name of the weight."""
    run = harness.start(layout, **options)
    from megatron_muon.plugin.optimizer_state import held_by

    held = next(each for each in held_by(run.optimizer, create=True) if "momentum_buffer" in each.tensors)
    names = {id(param): name for name, param in run.chunks[0].named_parameters()}
    with wrong_on_rank_1(what):
        return failure(lambda: harness.load_run(run, folder)), names[id(held.param)]


@pytest.mark.parametrize(
    "what,bf16",
    [("weight", False), ("weight", True), ("momentum_buffer", False), ("momentum_buffer", True), ("fp32_param", True)],
)
def test_copies_that_differ_after_loading(pool: RankPool, tmp_path: Path, what: str, bf16: bool) -> None:
    folder = str(tmp_path / "checkpoint")
    pool.run(save_after_a_step, 2, Layout(), {"bf16": bf16}, folder)
    results = pool.run(load_wrongly, 2, Layout(), {"bf16": bf16}, folder, what, timeout=TIMEOUT)
    text = one_error([error for error, _ in results])
    name = results[0][1]
    wanted = name if what == "weight" else f"{what} of {name}"
    assert [line.strip() for line in text.splitlines()[1:-1]] == [wanted]


# --- writing over a checkpoint ---------------------------------------------------------------------------------------


def overwrite_and_fail(first: str, second: str, late: bool) -> tuple[tuple[str, str], tuple[str, str], list[float]]:
    """A save that writes over ``second`` and is interrupted; what loading the two then gives."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    run = harness.start(Layout())
    run.losses(1)
    harness.save_run(run, first)
    losses = run.losses(1)
    harness.save_run(run, second)
    run.losses(1)
    original = TorchDistSaveShardedStrategy.save

    def save(self: Any, *args: Any) -> None:
        if late:
            original(self, *args)
        raise KeyboardInterrupt

    state = harness.model_state(run.chunks)
    state["optimizer"] = run.optimizer.sharded_state_dict(state, metadata=harness.CHECKPOINT_METADATA)
    with mock.patch.object(TorchDistSaveShardedStrategy, "save", save), contextlib.suppress(KeyboardInterrupt):
        dist_checkpointing.save({**state, "step": run.step}, second)
    error = failure(lambda: harness.load_run(run, second))
    other = failure(lambda: harness.load_run(run, first))
    return error, other, [*losses, *run.losses(1)]


@pytest.mark.parametrize("late", [False, True])
def test_interrupted_writing_over_a_checkpoint(pool: RankPool, tmp_path: Path, late: bool) -> None:
    """Before the data is written, or between the index and the last mark."""
    first, second = tmp_path / "iter_0000001", tmp_path / "iter_0000002"
    results = pool.run(overwrite_and_fail, 2, str(first), str(second), late, timeout=TIMEOUT)
    assert [folders.is_whole(folder) for folder in (first, second)] == [True, False]
    assert folders.newest(tmp_path) == 1
    text = one_error([error for error, _, _ in results])
    assert str(second) in text and "--ckpt-step" in text, text
    for _, other, (once, again) in results:
        assert other == ("", "")
        assert once == again


# --- the tracker -----------------------------------------------------------------------------------------------------


def read_tracker(path: str) -> tuple[str, str] | tuple[int, bool]:
    """With this package's hooks."""
    import megatron_muon

    megatron_muon.install()
    from megatron.training import checkpointing

    found: list[tuple[int, bool]] = []
    error = failure(lambda: found.append(checkpointing.read_metadata(path)))
    return found[0] if found else error


def make_folders(root: Path, marks: dict[int, tuple[str, ...]]) -> None:
    for iteration, names in marks.items():
        folder = root / f"iter_{iteration:07d}"
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(b"data")
        for name in names:
            (folder / name).write_text("{}")


BOTH = (".metadata", "metadata.json")
GARBLED = {"empty": b"", "blank": b" \n", "zeros": b"\0\0\0", "words": b"iter 2", "bytes": b"\xff\xfe2"}


@pytest.mark.parametrize("content", GARBLED.values(), ids=GARBLED)
def test_tracker_that_names_nothing(pool: RankPool, tmp_path: Path, content: bytes) -> None:
    make_folders(tmp_path, {1: BOTH, 3: BOTH, 20: (), 21: BOTH[:1], 22: BOTH[1:]})
    tracker = tmp_path / folders.TRACKER
    tracker.write_bytes(content)
    assert pool.run(read_tracker, 2, str(tracker), timeout=TIMEOUT) == [(3, False)] * 2
    assert tracker.read_bytes() == content


def test_tracked_iteration_that_was_being_written_over(pool: RankPool, tmp_path: Path) -> None:
    """A run that saves an iteration once more and is killed goes on from the one before."""
    make_folders(tmp_path, {3: BOTH, 4: BOTH})
    folders.write_tracker(tmp_path, "4")
    tracker = str(tmp_path / folders.TRACKER)
    assert pool.run(read_tracker, 2, tracker, timeout=TIMEOUT) == [(4, False)] * 2
    folders.forget(tmp_path / "iter_0000004")
    assert pool.run(read_tracker, 2, tracker, timeout=TIMEOUT) == [(3, False)] * 2


def test_tracker_that_names_nothing_where_nothing_is_whole(pool: RankPool, tmp_path: Path) -> None:
    make_folders(tmp_path, {1: BOTH[:1], 2: ()})
    tracker = tmp_path / folders.TRACKER
    tracker.write_text("")
    text = one_error(pool.run(read_tracker, 2, str(tracker), timeout=TIMEOUT))
    assert str(tracker) in text and "--load" in text


@pytest.mark.parametrize("content,wanted", [("1", (1, False)), ("1\n", (1, False)), ("release", (0, True))])
def test_good_tracker_is_as_ever(pool: RankPool, tmp_path: Path, content: str, wanted: tuple[int, bool]) -> None:
    make_folders(tmp_path, {1: BOTH, 3: BOTH})
    tracker = tmp_path / folders.TRACKER
    tracker.write_text(content)
    assert pool.run(read_tracker, 2, str(tracker), timeout=TIMEOUT) == [wanted] * 2


# --- other ways to save and load -------------------------------------------------------------------------------------

WAYS = {
    "plain": Layout(),
    "layer_wise": Layout(layer_wise=True),
    "tensor_parallel": Layout(tp=2),
}


def whole_state(run: harness.Run) -> dict[str, Any]:
    """Of model and optimizer, as ``harness.save_run`` saves it."""
    state = harness.model_state(run.chunks)
    optimizer = run.optimizer.sharded_state_dict(state, metadata=harness.CHECKPOINT_METADATA)
    return {**state, "optimizer": optimizer, "step": run.step}


def make_folder(folder: str) -> None:
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()


def save_in_the_background(layout: Layout, plain: str, background: str, parallel: bool) -> tuple[bool, bool]:
    """Save at once, and again in the background while a step is trained; whether it is whole before and after."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    run = harness.start(layout, bf16=True)
    run.losses(2)
    harness.save_run(run, plain)
    make_folder(background)
    strategy: Any = TorchDistSaveShardedStrategy()
    if parallel:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group, True)
    state = whole_state(run)
    request = dist_checkpointing.save(state, background, strategy, async_sharded_save=True, async_strategy="mcore")
    queue = AsyncCallsQueue()
    queue.schedule_async_request(request)
    run.losses(1)
    before = folders.is_whole(Path(background))
    dist.barrier()
    queue.close()
    return before, folders.is_whole(Path(background))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_saved_in_the_background_while_training(pool: RankPool, tmp_path: Path, way: str, parallel: bool) -> None:
    plain, background = str(tmp_path / "plain"), str(tmp_path / "background")
    results = pool.run(save_in_the_background, 2, WAYS[way], plain, background, parallel, timeout=TIMEOUT)
    assert results == [(False, True)] * 2
    assert differences(plain, background) == []
    assert pool.run(load_and_report, 2, WAYS[way], {"bf16": True}, background, timeout=TIMEOUT) == [("", "")] * 2


def save_by_the_persistent_worker(layout: Layout, plain: list[str], background: list[str]) -> list[tuple[bool, bool]]:
    """As ``--async-save --use-persistent-ckpt-worker --async-strategy mcore`` does, twice."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    run = harness.start(layout)
    queue = AsyncCallsQueue(persistent=True)
    found = []
    try:
        for now, later in zip(plain, background, strict=True):
            run.losses(1)
            harness.save_run(run, now)
            make_folder(later)
            request = dist_checkpointing.save(whole_state(run), later, async_sharded_save=True, async_strategy="mcore")
            queue.schedule_async_request(request)
            run.losses(3)
            before = folders.is_whole(Path(later))
            dist.barrier()
            queue.maybe_finalize_async_calls(blocking=True)
            found.append((before, folders.is_whole(Path(later))))
    finally:
        queue.close()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_saved_by_the_persistent_worker_while_training(pool: RankPool, tmp_path: Path, way: str) -> None:
    """Its process starts without the redirects to the CPU, and shares the memory of weights that training changes."""
    plain, background = ([str(tmp_path / f"{name}{number}") for number in (1, 2)] for name in ("plain", "background"))
    results = pool.run(save_by_the_persistent_worker, 2, WAYS[way], plain, background, timeout=2 * TIMEOUT)
    assert results == [[(False, True)] * 2] * 2
    for now, later in zip(plain, background, strict=True):
        assert differences(now, later) == []
    assert pool.run(load_and_report, 2, WAYS[way], {}, background[1], timeout=TIMEOUT) == [("", "")] * 2


def staged() -> tuple[bool, bool]:
    """Whether a tensor that is staged for writing is the one that was given: of own, and of shared memory."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    found = []
    for tensor in (torch.ones(3), torch.ones(3).share_memory_()):
        ((_, _, (_, [(_, copy)])),) = FileSystemWriterAsync.preload_tensors([("file", "key", ([], [(None, tensor)]))])
        assert torch.equal(copy, tensor)
        found.append(copy.data_ptr() == tensor.data_ptr())
    return found[0], found[1]


def test_what_another_process_writes_is_a_copy(pool: RankPool) -> None:
    assert pool.run(staged, 1) == [(True, False)]


def save_and_load_in_parallel(layout: Layout, plain: str, parallel: str, again: str) -> list[float]:
    """Every data-parallel rank writes and reads a part; losses before and after."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import (
        TorchDistLoadShardedStrategy,
        TorchDistSaveShardedStrategy,
    )

    run = harness.start(layout, bf16=True)
    run.losses(2)
    harness.save_run(run, plain)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    make_folder(parallel)
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), group, True)
    dist_checkpointing.save(whole_state(run), parallel, strategy)
    losses = run.losses(1)

    state = harness.model_state(run.chunks)
    template = run.optimizer.sharded_state_dict(state, is_loading=True, metadata=harness.CHECKPOINT_METADATA)
    loading = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
    loaded = dist_checkpointing.load({**state, "optimizer": template}, parallel, loading)
    harness.unwrap(run.chunks[0]).load_state_dict(loaded["model"])
    run.optimizer.load_state_dict(loaded["optimizer"])
    run.step = loaded["step"]
    harness.save_run(run, again)
    return [*losses, *run.losses(1)]


@pytest.mark.parametrize("way", WAYS)
def test_saved_and_loaded_by_all_ranks_in_parallel(pool: RankPool, tmp_path: Path, way: str) -> None:
    names = [str(tmp_path / name) for name in ("plain", "parallel", "again")]
    for once, again in pool.run(save_and_load_in_parallel, 2, WAYS[way], *names, timeout=TIMEOUT):
        assert once == again
    assert differences(names[0], names[1]) == []
    assert differences(names[0], names[2]) == []
