"""Optimizers of Megatron-Core asleep, in a file and on the host: what goes on meanwhile is right or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_muon
from megatron_muon import ConfigError
from tests.checkpoints import differences
from tests.megatron import harness
from tests.megatron.harness import Data, Layout, Run
from tests.megatron.test_checkpoint_saving import make_folder, whole_state
from tests.megatron.test_layer_wise_balance import arguments
from tests.megatron.test_state_by_others import copied, weights
from tests.pool import RankPool

SMALL = {"num_layers": 1, "data": Data(sequence=8, global_batch=2)}


def refused(work: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        work()
    return str(caught.value)


def asleep(layout: Layout, folder: str) -> dict[str, Any]:
    """Beside a run that is left alone: one that sleeps while it is saved, loaded, started anew and asked to step."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.training.training import calc_params_l2_norm

    alone, ours = (harness.start(layout, bf16=True, **SMALL) for _ in range(2))
    optimizer, found = ours.optimizer, dict[str, Any]()

    def go_on(name: str, steps: int = 1) -> None:
        alone.losses(steps), ours.losses(steps)
        found[name] = all(map(torch.equal, weights(alone), weights(ours)))

    go_on("first", 2)
    harness.save_run(alone, f"{folder}/now")

    # On the host: saved as it is.
    optimizer.sleep()
    before = copied(weights(ours))
    found["step on the host"] = refused(lambda: ours.losses(1))
    assert all(map(torch.equal, before, weights(ours)))
    harness.save_run(ours, f"{folder}/host")
    optimizer.wake()
    go_on("after the host")

    # In files, while a save in the background has not even begun to copy.
    make_folder(f"{folder}/background")
    harness.save_run(alone, f"{folder}/then")
    request = dist_checkpointing.save(
        whole_state(ours), f"{folder}/background", async_sharded_save=True, async_strategy="mcore"
    )
    found["files"] = optimizer.sleep(f"{folder}/asleep"), optimizer.sleep(f"{folder}/asleep")
    found["left"] = [value.device.type for leaf in leaves(ours) for value in large(leaf)]
    queue = AsyncCallsQueue()
    queue.schedule_async_request(request)
    found["step"] = refused(lambda: ours.losses(1))
    found["save"] = refused(lambda: whole_state(ours))
    found["state dict"] = refused(optimizer.state_dict)
    with arguments(use_megatron_fsdp=False, bf16=True, optimizer="muon"):
        found["norm"] = refused(lambda: calc_params_l2_norm(ours.chunks))
    found["bytes"] = megatron_muon.state_bytes(optimizer)
    if dist.get_rank() == 0:
        optimizer.wake()  # a rank that others have left alone
        found["step of one"] = refused(lambda: ours.losses(1))
    else:
        found["step of one"] = refused(lambda: ours.losses(1))
        optimizer.wake()
    go_on("after files")
    queue.close()

    # A load, and new weights of the model, wake it.
    optimizer.sleep(f"{folder}/asleep")
    harness.load_run(ours, f"{folder}/now")
    harness.load_run(alone, f"{folder}/now")
    go_on("after a load")
    optimizer.sleep(f"{folder}/asleep")
    optimizer.reload_model_params()
    alone.optimizer.reload_model_params()
    go_on("after new weights")

    # Started anew while asleep.
    for to in ("host", f"{folder}/asleep"):
        optimizer.sleep(to)
        megatron_muon.reset(optimizer)
        megatron_muon.reset(alone.optimizer)
        found[f"step after reset, {to == 'host'}"] = refused(lambda: ours.losses(1))
        optimizer.wake()
        go_on(f"after reset, {to == 'host'}")
    dist.barrier()
    found["files at the end"] = [path.name for path in Path(f"{folder}/asleep").iterdir()]
    return found


def leaves(run: Run) -> list[Any]:
    from megatron_muon.plugin.sleeping import wrapped

    return list(wrapped(run.optimizer))


def large(leaf: Any) -> list[torch.Tensor]:
    """State and masters that take memory: a stand-in of a master has one element."""
    state = [value for its in leaf.optimizer.state.values() for key, value in its.items() if key != "step"]
    masters = [param for group in leaf.optimizer.param_groups for param in group["params"]]
    return [value for value in [*state, *masters] if value.device.type != "meta" and any(value.stride())]


@pytest.mark.parametrize("layout", [Layout(layer_wise=True), pytest.param(Layout(tp=2), marks=pytest.mark.slow)])
def test_asleep_in_a_run(pool: RankPool, tmp_path: Path, layout: Layout) -> None:
    folder = str(tmp_path)
    for found in pool.run(asleep, 2, layout, folder):
        assert [name for name, is_same in found.items() if is_same is False] == []
        assert found["step on the host"].endswith(
            "is to step, but its state is asleep on the host: call wake() of the optimizer, or "
            "megatron_muon.wake(optimizer), before the step."
        )
        assert f"asleep in {folder}/asleep: call wake()" in found["step"] and found["step of one"] == found["step"]
        for name in ("save", "state dict", "norm"):
            assert found[name].endswith("before it is read or saved."), found[name]
        moved, again = found["files"]
        assert moved > 0 == again and found["left"] == []
        assert sum(found["bytes"].elsewhere.values()) == moved and not found["bytes"].on_device
        assert found["files at the end"] == []
    assert differences(f"{folder}/now", f"{folder}/host") == []
    assert differences(f"{folder}/then", f"{folder}/background") == []


def by_megatrons_words(layout: Layout) -> list[bool]:
    """Float32 weights without masters stay in DDP's buffers, from which other ranks get them."""
    alone, ours = (harness.start(layout, **SMALL) for _ in range(2))
    found = []
    for part in (ours.optimizer, *ours.optimizer.chained_optimizers):
        alone.losses(1), ours.losses(1)
        part.offload_to_cpu()
        refused(lambda: ours.losses(1))
        part.restore_from_cpu()
        alone.losses(1), ours.losses(1)
        found.append(all(map(torch.equal, weights(alone), weights(ours))))
    return found


def test_megatrons_own_words(pool: RankPool) -> None:
    for found in pool.run(by_megatrons_words, 2, Layout(layer_wise=True)):
        assert len(found) > 1 and all(found)
