"""Checkpoints of which something is lost or changed: one error that names it, on all ranks."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon.checkpoint.inspection import inspect
from megatron_muon.checkpoint.keys import name_of
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.loading import FINE, TIMEOUT, Outcome, failure, load_each, one_error, save_after_a_step
from tests.megatron.test_routing import MOE
from tests.pool import RankPool
from tests.slow import with_slow

WEIGHT = "decoder.layers.mlp.linear_fc1.weight"
MOMENTUM = f"optimizer.state.momentum_buffer.{WEIGHT}"


def hashes(folder: Path) -> dict[str, str]:
    """Of every file."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


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
    return f"weight of {WEIGHT}[{flip_bit_of(WEIGHT, folder)}]"


def flip_bit_of(key: str, folder: Path) -> int:
    """The lowest bit of one number; the layer."""
    from megatron_muon.checkpoint.reading import read_index

    index = read_index(folder)
    chunk = next(index.chunks(key))
    numbers = index.tensor(chunk).reshape(-1).view(torch.uint8).numpy().tobytes()
    path = folder / chunk.info.relative_path
    data = bytearray(path.read_bytes())
    data[data.index(numbers, chunk.info.offset) + len(numbers) // 8 * 4] ^= 1
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


def garble_record(folder: Path) -> str:
    from megatron_muon.checkpoint.keys import RECORD_KEY
    from megatron_muon.checkpoint.reading import read_index

    stored = read_index(folder).metadata.storage_data
    overwrite(folder, next(info for key, info in stored.items() if key.fqn.startswith(RECORD_KEY)))
    return "the record of its optimizer state"


def lose_tensor(folder: Path) -> str:
    """The storage has zeros where the momentum of one layer was."""
    from megatron_muon.checkpoint.reading import read_index

    index = read_index(folder)
    overwrite(folder, next(index.chunks(MOMENTUM)).info)
    return "what is stored"


def overwrite(folder: Path, info: Any, *numbers: torch.Tensor) -> None:
    """Put zeros in the place of one entry; or some numbers in the place of others in it."""
    path = folder / info.relative_path
    data = bytearray(path.read_bytes())
    entry = data[info.offset : info.offset + info.length]
    old, new = (each.view(torch.uint8).numpy().tobytes() for each in numbers) if numbers else (entry, bytes(len(entry)))
    assert old in entry
    data[info.offset : info.offset + info.length] = entry.replace(old, new)
    path.write_bytes(data)


OF_TENSORS = [truncate, lose_data, flip_bit, flip_bit_of_weight, lose_tensor, garble_record]
"""Found when tensors are loaded."""
OF_THE_REST = [lose_index, garble_index, cut_index, lose_mark, empty_mark, garble_common]
"""Found at the start of a run, too."""
DAMAGES = [damage.__name__ for damage in (*OF_TENSORS, *OF_THE_REST)]


class Damaged:
    """A copy of a checkpoint with one thing wrong.

    Attributes:
        folder: of the copy.
        what: the words that an error must have.
        files: the hashes of its files.
    """

    def __init__(self, source: Path, folder: Path, damage: Any) -> None:
        shutil.copytree(source, folder)
        self.folder = folder
        self.what: str = damage(folder)
        self.files = hashes(folder)


@pytest.fixture(scope="module")
def damaged(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Damaged]:
    """By the name of the damage."""
    root = tmp_path_factory.mktemp("damaged")
    folder = root / "undamaged" / "iter_0000001"
    pool.run(save_after_a_step, 2, Layout(tp=2), {}, str(folder))
    found = {each.__name__: Damaged(folder, root / each.__name__ / folder.name, each) for each in OF_TENSORS}
    found |= {each.__name__: Damaged(folder, root / each.__name__ / folder.name, each) for each in OF_THE_REST}
    return found | {"nothing": Damaged(folder, root / "nothing" / folder.name, lambda folder: "")}


Outcomes = dict[str, list[Outcome]]
"""Of each rank, by the name of the damage."""


def of_all(pool: RankPool, damaged: dict[str, Damaged], function: Any, *args: Any) -> Outcomes:
    """Call with the folders of all, the undamaged one last: what one raises does not reach the next."""
    folders = [str(each.folder) for each in damaged.values()]
    ranks = pool.run(function, 2, *args, folders, timeout=2 * TIMEOUT)
    return dict(zip(damaged, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.fixture(scope="module")
def loaded(pool: RankPool, damaged: dict[str, Damaged]) -> Outcomes:
    return of_all(pool, damaged, load_each, Layout(tp=2), {})


def check_error(outcomes: list[Outcome], damaged: Damaged) -> None:
    text = one_error(outcomes)
    assert str(damaged.folder) in text and damaged.what in text and "--ckpt-step" in text, text


def test_undamaged_checkpoint_loads(loaded: Outcomes) -> None:
    assert loaded["nothing"] == [FINE] * 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_one_error_on_all_ranks(
    damaged: dict[str, Damaged], loaded: Outcomes, damage: str
) -> None:
    check_error(loaded[damage], damaged[damage])
    assert hashes(damaged[damage].folder) == damaged[damage].files


def first_looks(folders: list[str]) -> list[Outcome]:
    """What ``megatron.training`` reads of each before anything else, at the start of a run."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing

    args = argparse.Namespace(ckpt_format="torch_dist", auto_detect_ckpt_format=False)

    def look(folder: str) -> None:
        assert checkpointing._get_checkpoint_format(folder, args) == "torch_dist"
        dist_checkpointing.load_common_state_dict(folder)

    return [failure(lambda folder=folder: look(folder)) for folder in folders]  # type: ignore[misc]


@pytest.fixture(scope="module")
def looked_at(pool: RankPool, damaged: dict[str, Damaged]) -> Outcomes:
    return of_all(pool, damaged, first_looks)


@pytest.mark.parametrize("damage", [damage.__name__ for damage in OF_THE_REST])
def test_damage_is_named_at_the_start_of_a_run(damaged: dict[str, Damaged], looked_at: Outcomes, damage: str) -> None:
    check_error(looked_at[damage], damaged[damage])


def test_a_start_reads_no_tensors(looked_at: Outcomes) -> None:
    """Nor does it hash all files of a large checkpoint: what is wrong with tensors is found when they are loaded."""
    for damage in ("nothing", *(each.__name__ for each in OF_TENSORS)):
        assert looked_at[damage] == [FINE] * 2, damage


def halves(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.roll(x.shape[axis] // 2, axis)


FC1, FC2 = WEIGHT, "decoder.layers.mlp.linear_fc2.weight"
QKV, PROJ = (f"decoder.layers.self_attention.linear_{name}.weight" for name in ("qkv", "proj"))
EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc1.weight"

Move = tuple[str, int | slice, Any]

MOVES: list[Move] = [
    (FC1, 0, lambda x: halves(x, 0)),  # gate and up
    (FC1, 1, lambda x: x.unflatten(0, (2, 2, -1)).flip(1).flatten(0, 2)),  # shards of tensor-parallel ranks
    (FC1, slice(2, 4), lambda x: x.flip(0)),  # two layers
    (FC2, 0, lambda x: halves(x, 1)),
    (FC2, 1, lambda x: torch.cat([x[3:4], x[1:3], x[:1], x[4:]])),  # two rows
    (PROJ, 0, lambda x: x.t()),
    (PROJ, 1, lambda x: x.flatten().roll(1).view_as(x)),
    (QKV, 0, lambda x: x.roll(1, 0)),
    (QKV, 1, lambda x: halves(x, 0)),  # query groups
]
"""What a wrong offset would make of a tensor of four layers, or of some: the same elements as before."""

WHOLE: list[Move] = [
    ("embedding.word_embeddings.weight", slice(None), lambda x: halves(x, 0)),
    ("decoder.final_layernorm.weight", slice(None), lambda x: x.flip(0)),
]
"""And of one that no layers have: under Adam."""

OF_EXPERTS: list[Move] = [
    (EXPERTS, 0, lambda x: x.flip(0)),  # all experts of a layer
    (EXPERTS, 1, lambda x: torch.stack([halves(x[0], 0), *x[1:]])),  # gate and up of one
]


def move(folder: Path, prefix: str, moves: list[Move], depth: int) -> set[str]:
    """Store moved elements in the place of others; the names of what has changed, with layer and expert."""
    from megatron_muon.checkpoint.reading import read_index

    index, changed = read_index(folder), set()
    for key, where, change in moves:
        parts = [
            (chunk, tuple(map(slice, chunk.offsets, map(sum, zip(chunk.offsets, chunk.sizes, strict=True)))))
            for chunk in index.chunks(prefix + key)
        ]
        before = torch.zeros(index.tensors[prefix + key].size)
        for chunk, place in parts:
            before[place] = index.tensor(chunk)
        after = before.clone()
        after[where] = change(before[where])
        assert torch.equal(after.flatten().sort()[0], before.flatten().sort()[0])
        for each in itertools.product(*map(range, before.shape[:depth])):
            if not torch.equal(after[each], before[each]):
                changed.add(name_of(key, each))
        for chunk, place in parts:
            overwrite(folder, chunk.info, *(each[place].contiguous() for each in (before, after)))
    return changed


def test_elements_that_have_moved(pool: RankPool, damaged: dict[str, Damaged], tmp_path: Path) -> None:
    """Of the model's weights, and of the state of each, in rows, columns, shards and slices: each is named."""
    whole, weights, states = damaged["nothing"].folder, tmp_path / "weights", tmp_path / "states"
    for folder in (weights, states):
        shutil.copytree(whole, folder)
    names = {
        str(weights): {f"weight of {name}" for name in move(weights, "", MOVES, 1) | move(weights, "", WHOLE, 0)},
        str(states): {
            f"{state} of {name}"
            for state, moves, depth in (("momentum_buffer", MOVES, 1), ("exp_avg", WHOLE, 0))
            for name in move(states, f"optimizer.state.{state}.", moves, depth)
        },
    }
    for layout in (Layout(), Layout(layer_wise=True)):
        outcomes = pool.run(load_each, 2, layout, {}, [*names, str(whole)], timeout=TIMEOUT)
        for folder, *each in zip([*names, str(whole)], *outcomes, strict=True):
            assert each == [FINE] * 2 if folder == str(whole) else named(each) == names[folder], folder
    assert inspect(whole, contents=True)["problems"] == []
    for folder in names:
        assert set(inspect(Path(folder), contents=True)["problems"]) == {
            f"{name} is not what was saved" for name in names[folder]
        }


def named(outcomes: list[Outcome]) -> set[str]:
    """What an error lists."""
    return {line.strip() for line in one_error(outcomes).splitlines()[1:-1]}


FLIPS = {
    "experts_of_ep2": (2, Layout(ep=2), MOE, EXPERTS),
    "gate_and_up_of_tp2": (2, Layout(tp=2), {}, WEIGHT),
    "norm_of_pp2_bf16": (2, Layout(pp=2), {"bf16": True}, "decoder.layers.self_attention.linear_qkv.layer_norm_weight"),
}


@pytest.mark.parametrize("case", with_slow(FLIPS, "gate_and_up_of_tp2", "norm_of_pp2_bf16"))
def test_flipped_bit_of_a_weight_at_another_layout(pool: RankPool, tmp_path: Path, case: str) -> None:
    """Experts, fused weights and copies: sums do not depend on the layout, and see one bit."""
    ranks, source, options, key = FLIPS[case]
    whole, flipped, moved = (tmp_path / name / "iter_0000001" for name in ("whole", "flipped", "moved"))
    pool.run(save_after_a_step, ranks, source, options, str(whole))
    for folder in (flipped, moved):
        shutil.copytree(whole, folder)
    flip_bit_of(key, flipped)
    names = {f"weight of {name}" for name in move(moved, "", OF_EXPERTS, 2)} if key == EXPERTS else set()
    folders = [str(whole), str(flipped), *([str(moved)] if names else [])]
    for layout in (Layout(), Layout(layer_wise=True)):
        outcomes = pool.run(load_each, 2, layout, options, folders, timeout=TIMEOUT)
        assert [good for good, *_ in outcomes] == [FINE] * 2
        (name,) = named([bad for _, bad, *_ in outcomes])
        assert name.startswith(f"weight of {key}"), name
        assert not names or named([bad for _, _, bad in outcomes]) == names


def test_vocabulary_that_is_padded_otherwise(pool: RankPool, tmp_path: Path) -> None:
    """Megatron pads it for the tensor-parallel size: rows that only one of two runs has are no damage."""
    folder = str(tmp_path / "iter_0000001")
    for saves, loads in ((72, 64), (64, 72)):
        path = f"{folder}-{saves}"
        pool.run(save_after_a_step, 2, Layout(tp=2), {"data": harness.Data(vocabulary=saves)}, path)
        for layout in (Layout(), Layout(layer_wise=True)):
            options = {"data": harness.Data(vocabulary=loads)}
            assert pool.run(load_each, 2, layout, options, [path], timeout=TIMEOUT) == [[FINE]] * 2
