"""What a rank allocates while it saves and loads: nothing beyond its own state but a few pieces of bounded size."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_muon.checkpoint import fingerprint, pieces
from tests.checkpoints import differences
from tests.megatron import harness
from tests.megatron.harness import Data, Layout
from tests.pool import RankPool

LARGE = Data(vocabulary=12_000)
"""Two tables of 12,000 x 32 beside weights of some thousand elements."""

TABLE = 12_000 * 32 * 4
"""Bytes of a float32 state of one of them."""

PIECE = 1 << 16
"""Bytes that are read at once."""

BOUND = 4 * PIECE
"""Beyond own state: a piece, as bytes and as a tensor, and what is no state."""


class Made(TorchDispatchMode):
    """Bytes of tensors that are made within it and still there: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def known(self, tensor: torch.Tensor) -> None:
        """It was there before."""
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        before = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if is_real(each)}
        for each in tree_leaves(found):
            if is_real(each) and each.untyped_storage()._cdata not in before | self._known:
                self._add(each.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        self._known.add(number)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self._known.discard(number)
            self.now -= size

        weakref.finalize(storage, gone)


@contextlib.contextmanager
def small_pieces() -> Iterator[None]:
    """Files are read, and sums taken, in pieces that are small beside these tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", PIECE)
        patch.setitem(fingerprint._PIECE, "cpu", PIECE // 16)
        yield


def is_real(each: Any) -> bool:
    return type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type != "meta"


def save(layout: Layout, options: dict[str, Any], folder: str) -> int:
    """Bytes that the optimizer's part of a checkpoint takes, at most."""
    from megatron.core import dist_checkpointing

    run = harness.start(layout, bf16=True, data=LARGE, **options)
    run.losses(1)
    state = harness.model_state(run.chunks)
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()
    with small_pieces(), Made() as made:
        optimizer = run.optimizer.sharded_state_dict(state, metadata=harness.CHECKPOINT_METADATA)
    dist_checkpointing.save({**state, "optimizer": optimizer, "step": run.step}, folder)
    return made.most


def load(layout: Layout, options: dict[str, Any], folder: str, again: str) -> list[int]:
    """Bytes beyond the optimizer's own state while a checkpoint is loaded: at most, and in the end."""
    from megatron_muon.plugin.optimizer_state import param_states

    run = harness.start(layout, bf16=True, data=LARGE, **options)
    if layout.ddp_buffers:
        assert len(run.chunks[0].buffers[0].buckets) >= 7, "a table is cut in two, and so are some of the others"
    with small_pieces(), Made() as made:
        harness.load_run(run, folder)
    # Master weights are there from the start.
    held = [(name, tensor) for each in param_states(run.optimizer) for name, tensor in each.tensors.items()]
    own = sum(tensor.numel() * tensor.element_size() for name, tensor in held if name != "fp32_param")
    assert own > TABLE, "two moments of a half of each table"
    harness.save_run(run, again)
    return [made.most - own, made.now - own]


WAYS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "plain": (Layout(), {"muon_ckpt_changes": "accept"}),
    "layer_wise": (Layout(layer_wise=True), {"muon_ckpt_changes": "accept"}),
    "adam_in_slices": (Layout(ddp_buffers=True, bucket_size=3000), {"muon_ckpt_changes": "accept", "name": "adam"}),
}


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """Checkpoints with whole tables from one rank, and with slices from two; bytes that were made for them."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    for name in ("plain", "layer_wise"):
        layout, options = WAYS[name]
        found[name] = str(root / name), max(pool.run(save, 2, layout, {"optimizer": options}, str(root / name)))
    return found


def test_nothing_is_gathered_at_save(saved: dict[str, tuple[str, int]]) -> None:
    assert max(most for _, most in saved.values()) < BOUND


@pytest.mark.parametrize(
    "source,to",
    [
        ("layer_wise", "plain"),
        pytest.param("layer_wise", "layer_wise", marks=pytest.mark.slow),
        pytest.param("plain", "adam_in_slices", marks=pytest.mark.slow),
        ("layer_wise", "adam_in_slices"),
    ],
)
def test_own_state_and_a_piece(pool: RankPool, saved: dict[str, tuple[str, int]], source: str, to: str) -> None:
    """The same bits are saved again."""
    layout, options = WAYS[to]
    folder, again = saved[source][0], f"{saved[source][0]}-{to}"
    for most, end in pool.run(load, 2, layout, {"optimizer": options}, folder, again):
        assert max(most, end) < BOUND
    if to != "adam_in_slices":
        assert differences(folder, again) == []
