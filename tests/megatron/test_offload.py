"""``--muon-offload`` in runs of Megatron-Core: losses, weights and checkpoints are those of state on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon.plugin.kept import describe_kept
from tests.checkpoints import differences
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_checkpoint_saving import make_folder, whole_state
from tests.megatron.test_sleeping import SMALL
from tests.megatron.test_state_by_others import muon, weights
from tests.pool import RankPool

NEAR: dict[str, dict[str, Any]] = {
    "momentum": {},
    "all": {"muon_master": "remainder", "muon_momentum_dtype": "int8", "muon_qkv": "per_head"},
}


def beside(layout: Layout, folder: str, offload: str, **model: Any) -> dict[str, Any]:
    """Two runs, one with its momentum on the host: trained, saved while they train, loaded crosswise, asleep."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    options = NEAR[offload]
    far_options = {**options, "muon_offload": offload, "muon_chunk_mb": 0.003}
    near, far = (harness.start(layout, optimizer=each, early=True, **SMALL, **model) for each in (options, far_options))
    found = dict[str, Any]()

    def go_on(name: str) -> None:
        found[name] = near.losses(1) == far.losses(1) and all(map(torch.equal, weights(near), weights(far)))

    go_on("first"), go_on("second")
    harness.save_run(near, f"{folder}/near")
    make_folder(f"{folder}/far")
    request = dist_checkpointing.save(
        whole_state(far), f"{folder}/far", async_sharded_save=True, async_strategy="mcore"
    )
    queue = AsyncCallsQueue()
    queue.schedule_async_request(request)
    go_on("while it is saved")
    queue.close()
    for run, other in ((near, "far"), (far, "near")):
        harness.load_run(run, f"{folder}/{other}")
    go_on("loaded crosswise")
    far.optimizer.sleep()
    far.optimizer.wake()
    go_on("after sleep")
    (line,) = describe_kept(far.optimizer)
    kept = "int8 on the host" if offload == "all" else "fp32 on the host"
    found["report"] = f"momentum {kept}" in line and "bytes a parameter and" in line
    windows = muon(far).windows
    assert windows is not None
    found["windows"] = windows.counters.largest, windows.bound
    return found


@pytest.mark.parametrize(
    "layout,offload,model",
    [
        (Layout(layer_wise=True), "all", {"bf16": True}),
        pytest.param(Layout(layer_wise=True), "momentum", {"bf16": True}, marks=pytest.mark.slow),
        pytest.param(Layout(tp=2), "momentum", {}, marks=pytest.mark.slow),
        pytest.param(Layout(tp=2), "all", {"bf16": True}, marks=pytest.mark.slow),
    ],
    ids=["layer-wise, all", "layer-wise, momentum", "TP 2, float32", "TP 2, all"],
)
def test_the_run_is_that_of_momentum_on_the_device(
    pool: RankPool, tmp_path: Path, layout: Layout, offload: str, model: dict[str, Any]
) -> None:
    for found in pool.run(beside, 2, layout, str(tmp_path), offload, **model):
        largest, bound = found.pop("windows")
        assert 0 < largest <= bound
        assert all(found.values()), found
    assert differences(f"{tmp_path}/near", f"{tmp_path}/far") == []
