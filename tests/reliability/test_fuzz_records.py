"""Our record in a checkpoint, changed at random: the load is refused and says where, or gives what was saved."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.inspection import inspect
from megatron_muon.checkpoint.keys import RECORD_KEY
from megatron_muon.checkpoint.reading import COMMON, read_index
from megatron_muon.checkpoint.record import RECORD
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_nonfinite import state_of
from tests.pool import RankPool
from tests.reliability.fuzz import each_example

VALUES = [None, 0, 1, -1, 7, 2**70, 0.5, float("nan"), "", "adam", "muon", True, [], {}, [0], {"a": 1}, (1, 2)]
Path_ = tuple[Any, ...]


def places(tree: Any, path: Path_ = ()) -> list[Path_]:
    """Of everything in a tree of dictionaries and lists, but for the tree itself."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


def changed(tree: Any, path: Path_, how: str, value: Any) -> Any:
    """A copy with one entry dropped, in the place of which there is another value, or which is cut."""
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    old = parent[path[-1]]
    if how == "drop":
        del parent[path[-1]]
    elif how == "add":
        parent[path[-1]] = (
            [*old, value] if isinstance(old, list) else {**old, "new": value} if isinstance(old, dict) else value
        )
    elif how == "cut" and isinstance(old, (str, list)):
        parent[path[-1]] = old[: len(old) // 2]
    elif how == "cut" and isinstance(old, dict):
        parent[path[-1]] = dict(list(old.items())[: len(old) // 2])
    else:
        parent[path[-1]] = copy.deepcopy(value) if how == "change" else str(old) if not isinstance(old, str) else [old]
    return tree


HOWS = ["drop", "change", "change", "cut", "retype", "add"]


class Checkpoint:
    """A checkpoint of which an entry that is no tensor can be written anew: its record, or the note of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = (folder / ".metadata").read_bytes()
        metadata = pickle.loads(self._index)
        self._keys = {key.fqn: key for key in metadata.storage_data if key.fqn.startswith((RECORD_KEY, COMMON))}
        index = read_index(folder, True)
        self.contents = {name: index.object(name) for name in self._keys}
        self.record = next(name for name in self._keys if name.startswith(RECORD_KEY))

    def write(self, name: str, content: Any) -> None:
        """The other entries are as they were saved."""
        data = io.BytesIO()
        torch.save(content, data)
        (self.folder / "fuzzed.distcp").write_bytes(data.getvalue())
        metadata = pickle.loads(self._index)
        info = metadata.storage_data[self._keys[name]]
        info.relative_path, info.offset, info.length = "fuzzed.distcp", 0, len(data.getvalue())
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))

    def note(self) -> Path_:
        """Where the note of the record is in what is no tensor."""
        return next(path for path in places(self.contents[COMMON]) if path[-1] == RECORD)


def save(folder: str) -> None:
    run = harness.start(Layout(), num_layers=1)
    run.losses(2)
    harness.save_run(run, folder)


def load_each(folder: str, examples: int) -> dict[str, int]:
    checkpoint = Checkpoint(Path(folder))
    run = harness.start(Layout(), num_layers=1)
    harness.load_run(run, folder)
    expected = state_of(run)
    steps = steps_of(run)
    note = checkpoint.note()
    of_record = [(checkpoint.record, path) for path in places(checkpoint.contents[checkpoint.record]) if len(path) > 1]
    of_note = [(COMMON, path) for path in places(checkpoint.contents[COMMON]) if path[: len(note)] == note]
    count = {"refused": 0, "equal": 0}

    def check(example: Any) -> None:
        (name, path), how, value = example
        before = checkpoint.contents[name]
        checkpoint.write(name, changed(before, path, how, value))
        run.losses(1)  # all is other than what was saved, steps too
        problems = []
        try:
            harness.load_run(run, folder)
        except CheckpointError as error:
            assert folder in str(error) or "megatron_muon.record" in str(error), str(error)
            problems.append(str(error))
        try:
            inspect(Path(folder))
        except CheckpointError as error:
            assert problems, f"inspect alone refuses: {error}"
        count["refused" if problems else "equal"] += 1
        if not problems:
            after = state_of(run)
            assert [key for key, tensor in after.items() if not torch.equal(tensor, expected[key])] == []
            assert steps_of(run) == steps

    strategy = st.tuples(
        st.one_of(st.sampled_from(of_record), st.sampled_from(of_note)), st.sampled_from(HOWS), st.sampled_from(VALUES)
    )
    each_example(strategy, examples, check)
    return count


def steps_of(run: Any) -> list[int]:
    from megatron_muon.plugin.optimizer_state import param_states

    return [
        int(each.group.get("step", each.inner.state[each.key].get("step", 0))) for each in param_states(run.optimizer)
    ]


@pytest.mark.parametrize("examples", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_a_changed_record_is_refused_or_means_the_same(pool: RankPool, tmp_path: Path, examples: int) -> None:
    folder = tmp_path / "iter_0000002"
    pool.run(save, 1, str(folder))
    (count,) = pool.run(load_each, 1, str(folder), examples, timeout=60 + examples)
    print(count)
    assert count["refused"] > examples // 2 and count["equal"]
