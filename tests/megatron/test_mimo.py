"""MIMO: models with process groups of their own in one, trained, clipped, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_muon
from megatron_muon.plugin.qk_clip import clip_of
from tests.launch import records
from tests.megatron import harness, mimo
from tests.megatron.harness import Layout
from tests.pool import RankPool

CLIP = {"qk_clip": True, "qk_clip_threshold": 0.05}


def start(
    parts: dict[str, tuple[int, int, int]],
    options: dict[str, Any] | None,
    layer_wise: bool = False,
    name: str = "muon",
    **asked: Any,
) -> tuple[Any, Any]:
    """A model, and its optimizer; with ``options`` for the encoder its own."""
    megatron_muon.install()
    from megatron.core import parallel_state
    from megatron.core.models.mimo.optimizer import MimoOptimizer, get_mimo_optimizer
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        Layout(tp=dist.get_world_size()).initialize()
    model_parallel_cuda_manual_seed(1)
    model = mimo.build(*(mimo.grid_of(*parts[name]) for name in ("language", "images")), clip=CLIP)
    config = harness.optimizer_config(Layout(layer_wise=layer_wise, overlap=False), name=name, **asked)
    if options is None:
        return model, get_megatron_optimizer(config, [model])
    optimizer = get_mimo_optimizer(model, config)
    info = optimizer.module_infos["images"]
    if info.is_active:
        info.optimizer = get_megatron_optimizer(
            harness.optimizer_config(Layout(), **options),
            [model.modality_submodules["images"]],
            use_gloo_process_groups=False,
            pg_collection=info.pg_collection,
        )
    return model, MimoOptimizer(optimizer.module_infos, config)


def train(model: Any, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = mimo.backward(model, step % 2)
        assert optimizer.step()[0]
        losses.append(loss)
    return losses


def whole(
    parts: dict[str, tuple[int, int, int]], folder: str, options: dict[str, Any] | None, name: str = "muon"
) -> dict[str, Any]:
    """Four steps, and two of a new model that begins with the checkpoint of the second."""
    from megatron.core import dist_checkpointing

    model, optimizer = start(parts, options, name=name)
    losses = train(model, optimizer, range(2))
    state = model.sharded_state_dict()
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    dist_checkpointing.save({**state, "optimizer": optimizer.sharded_state_dict(state)}, folder)
    megatron_muon.sleep(optimizer, f"{folder}-asleep")
    if options is None and name == "muon":  # ranks of Adam's alone are not asked before a step
        with pytest.raises(megatron_muon.ConfigError, match="asleep"):
            train(model, optimizer, range(2, 3))
    megatron_muon.wake(optimizer)
    losses += train(model, optimizer, range(2, 4))
    from megatron.core.optimizer.qk_clip import clip_qk

    clips = [clip_of(part) for part in model._active_submodules()]
    found = {
        "losses": losses,
        "clipped": [int(clip.heads_clipped) for clip in clips if clip is not None],
        "logit": float(clip_qk([model])),
        "weights": [param.detach().clone() for param in model.parameters()],
    }
    model, optimizer = start(parts, options, name=name)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)
    state = model.sharded_state_dict()
    template = optimizer.sharded_state_dict(state, is_loading=True)
    loaded = dist_checkpointing.load({**state, "optimizer": template}, folder)
    model.load_state_dict({key: value for key, value in loaded.items() if key in state}, strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    found["resumed"] = train(model, optimizer, range(2, 4))
    found["same"] = all(torch.equal(*pair) for pair in zip(model.parameters(), found.pop("weights"), strict=True))
    return found


LAYOUTS = {
    "colocated": {"language": (0, 2, 1), "images": (0, 1, 2)},
    "apart": {"language": (1, 1, 1), "images": (0, 1, 1)},
}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        pytest.param("colocated", None, id="colocated-muon", marks=pytest.mark.slow),
        pytest.param("colocated", {"name": "adam"}, id="colocated-encoder under adam"),
        pytest.param("apart", None, id="apart-muon"),
        pytest.param("apart", {"name": "adam"}, id="apart-encoder under adam", marks=pytest.mark.slow),
    ],
)
def test_trains_clips_saves_and_resumes(pool: RankPool, tmp_path: Path, layout: str, options: Any) -> None:
    ranks = pool.run(whole, 2, LAYOUTS[layout], str(tmp_path / "checkpoint"), options)
    for found in ranks:
        assert found["losses"][0] > found["losses"][2] and found["resumed"] == found["losses"][2:]
        assert found["same"]
    language = ranks[-1]
    assert language["clipped"][0] > 0 and language["logit"] > 0.05
    assert (ranks[0]["clipped"] == []) == (layout == "apart")


def test_adam_of_models_on_ranks_of_their_own_resumes(pool: RankPool, tmp_path: Path) -> None:
    """The first rank stores plain data, and has no part of the language model, whose step counts were lost."""
    for found in pool.run(whole, 2, LAYOUTS["apart"], str(tmp_path / "checkpoint"), None, "adam"):
        assert found["resumed"] == found["losses"][2:] and found["same"]


def shared_out() -> list[tuple[list[float], list[float]]]:
    """Losses and norms of gradients without and with owners of weights, each model on two of four ranks."""
    found = []
    for layer_wise in (False, True):
        model, optimizer = start({"language": (2, 1, 2), "images": (0, 1, 2)}, None, layer_wise)
        parts = [info.optimizer for info in optimizer.module_infos.values() if info.optimizer is not None]
        assert all((type(part).__name__ == "LayerWiseDistributedOptimizer") is layer_wise for part in parts)
        norms, norm = [], optimizer.get_grad_norm

        def get_grad_norm(norm: Any = norm, norms: list[float] = norms) -> float:
            norms.append(norm())
            return norms[-1]

        optimizer.get_grad_norm = get_grad_norm
        found.append((train(model, optimizer, range(3)), norms))
    return found


def test_owners_of_weights_on_some_of_the_ranks(pool: RankPool) -> None:
    """The gradient's norm is each model's own, which Megatron-Core's layer-wise optimizer sums over the run."""
    for (losses, norms), (shared_losses, shared_norms) in pool.run(shared_out, 4):
        assert shared_losses == pytest.approx(losses, rel=1e-5) and shared_norms == pytest.approx(norms, rel=1e-5)
        assert len(norms) == 3


def measured(parts: dict[str, tuple[int, int, int]], file: str) -> tuple[list[float], list[float]]:
    """Losses without and with a record."""
    asked = {"muon_log_interval": 2, "muon_check_replicas_interval": 2, "muon_alarm": "stop", "muon_log_jsonl": file}
    plain = train(*start(parts, None), range(4))
    return plain, train(*start(parts, None, **asked), range(4))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_model_on_the_last_rank_is_recorded(pool: RankPool, tmp_path: Path, layout: str) -> None:
    file = tmp_path / "record.jsonl"
    for plain, watched in pool.run(measured, 2, LAYOUTS[layout], str(file)):
        assert plain == watched
    found = [set(record["classes"]) for record in records(file, "muon")]
    assert len(found) == (4 if layout == "colocated" else 2)  # of steps 1 and 2: the fourth is told before the fifth
    language = [classes for classes in found if any("linear_qkv" in name for name in classes)]
    assert language and all(len(classes) > 1 for classes in found) and records(file, "alarm") == []
