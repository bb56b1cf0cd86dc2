"""What Megatron's log says about optimizers: of one, of several in the process, of a model on some of the ranks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import plugin
from megatron_muon.plugin.qk_clip import clip_of
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.loading import Outcome, failure
from tests.pool import RankPool

CLIP = {"qk_clip": True, "qk_clip_threshold": 0.05}
STIEFEL = {"name": "stiefel_muon", "muon_param_rule": ("decoder.layers.0.*.linear_proj.weight=stiefel",)}


class Log:
    """Megatron's log with the hooks that are there, and what has gone to its TensorBoard writer."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []
        self._log = self._nothing
        for patch in plugin._PATCHES.patches:
            if patch.path == "training_log":
                self._log = patch.make(self._log)

    @staticmethod
    def _nothing(loss_dict: Any, iteration: int, skipped_iter: int = 0, is_first_iteration: bool = False) -> None:
        """As much of Megatron's function as the hooks see."""

    def add_scalar(self, name: str, value: float, iteration: int) -> None:
        self.points.append((name, value, iteration))

    def write(self, iteration: int, first: bool = False) -> list[str]:
        """The lines after an iteration."""
        with contextlib.redirect_stdout(io.StringIO()) as text:
            self._log({}, iteration, is_first_iteration=first)
        return text.getvalue().splitlines()


@contextlib.contextmanager
def log(**arguments: Any) -> Iterator[Log]:
    import megatron.training.global_vars as training

    written = Log()
    with pytest.MonkeyPatch.context() as patch:
        values = {"log_interval": 1, "tensorboard_log_interval": 1, **arguments}
        patch.setattr(training, "_GLOBAL_ARGS", SimpleNamespace(**values))
        patch.setattr(training, "_GLOBAL_TENSORBOARD_WRITER", written)
        yield written


def another(optimizer: dict[str, Any], seed: int = 1, **build: Any) -> harness.Run:
    """One more run in the process groups that are there."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(seed)
    layout = Layout(tp=dist.get_world_size())
    chunks = harness.wrap(harness.build_model(layout, **build), layout)
    return harness.Run(layout, chunks, get_megatron_optimizer(harness.optimizer_config(layout, **optimizer), chunks))


def begin() -> None:
    import megatron_muon

    megatron_muon.install()
    Layout(tp=dist.get_world_size()).initialize()


def written() -> tuple[list[tuple[str, float, int]], list[list[str]], dict[str, float]]:
    """Three iterations of a run."""
    begin()
    with log(log_interval=2) as megatrons:
        run = another({"muon_qk_log_layers": 2}, **CLIP)
        lines = []
        for iteration in (1, 2, 3):
            run.losses(1)
            lines.append(megatrons.write(iteration, first=iteration == 1))
            if iteration == 2:
                layers = clip_of(run.chunks).by_layer()
    return megatrons.points, lines, layers


def test_the_last_rank_writes(pool: RankPool) -> None:
    """Text when Megatron logs, which the first iteration is; curves at their own interval."""
    first, last = pool.run(written, 2)
    assert first[0] == [] and first[1] == [[], [], []]
    points, lines, layers = last
    each = [(name, iteration) for name, _, iteration in points]
    two = ["qk-clip/max attention logit", "qk-clip/heads clipped"]
    expected = [(name, iteration) for iteration in (1, 2, 3) for name in two]
    expected[4:4] = [(f"qk-clip/decoder.layers.{i}.self_attention", 2) for i in range(4)]
    assert each == expected
    logits = [value for name, value, _ in points if name == two[0]]
    assert max(layers.values()) == logits[1] > 0.05
    clipped = [value for name, value, _ in points if name == two[1]]
    assert lines == [
        [f" QK-clip after iteration 1: max attention logit {logits[0]:.5g}, heads clipped {clipped[0]}"],
        [f" QK-clip after iteration 2: max attention logit {logits[1]:.5g}, heads clipped {clipped[1]}"],
        [],
    ]


def begin_nowhere() -> Outcome:
    """Training whose record is to be in a folder that nobody can make; rank 0 has nothing to write."""
    from megatron_muon.plugin import recording

    (train,) = (patch.make for patch in recording.PATCHES if patch.path == "train")
    with log(muon_log_jsonl="/proc/nowhere/m.jsonl", iteration=0, train_iters=1, world_size=2):
        return failure(train(lambda optimizer=None: None))


def test_a_record_that_cannot_be_begun_stops_all_ranks(pool: RankPool) -> None:
    mine, theirs = pool.run(begin_nowhere, 2)
    assert mine == theirs and mine[0] == "ConfigError" and mine[1].startswith("--muon-log-jsonl /proc/nowhere/m.jsonl")


def beside(second: dict[str, Any], build: dict[str, Any], order: tuple[str, str]) -> list[tuple[list[str], list[str]]]:
    """An actor under Muon with QK-clip and another model in one process: lines and curves after steps of theirs."""
    begin()
    given = {"actor": (STIEFEL, {"log_max_attention_logit": True}), "critic": (second, build)}
    with log() as megatrons:
        runs = {name: another(given[name][0], seed=1 + (name == "critic"), **given[name][1]) for name in order}
        found = []
        for iteration, stepping in enumerate((("actor",), ("critic",), ("actor", "critic"), ()), start=1):
            for name in stepping:
                runs[name].losses(1)
            megatrons.points.clear()
            lines = [line.partition(":")[0].strip() for line in megatrons.write(iteration)]
            found.append((lines, [name for name, _, _ in megatrons.points]))
    return found


ORDERS = [("actor", "critic"), ("critic", "actor")]


@pytest.mark.parametrize("order", ORDERS, ids=" first, ".join)
def test_a_critic_under_adam_leaves_the_actors_numbers_alone(pool: RankPool, order: tuple[str, str]) -> None:
    found = pool.run(beside, 1, {"name": "adam"}, {}, order)[0]
    actors = ["stiefel/tangency", "qk-clip/max attention logit"]
    lines = ["Stiefel manifold after iteration {}", "QK-clip after iteration {}"]
    for iteration in (1, 3):
        assert found[iteration - 1] == ([line.format(iteration) for line in lines], actors)
    assert found[1] == found[3] == ([], [])


@pytest.mark.parametrize("order", ORDERS, ids=" first, ".join)
def test_two_models_under_muon(pool: RankPool, order: tuple[str, str]) -> None:
    """Each has its own numbers; where one log is about both, the one that was built later has another name."""
    found = pool.run(beside, 1, {}, CLIP, order)[0]
    assert found[0] == (
        ["Stiefel manifold after iteration 1", "QK-clip after iteration 1"],
        ["stiefel/tangency", "qk-clip/max attention logit"],
    )
    critics = ["qk-clip/max attention logit", "qk-clip/heads clipped"]
    assert found[1] == (["QK-clip after iteration 2"], critics)
    lines, points = found[2]
    assert sorted(lines) == [
        "QK-clip 2 after iteration 3",
        "QK-clip after iteration 3",
        "Stiefel manifold after iteration 3",
    ]
    assert ("qk-clip-2/heads clipped" in points) == (order[1] == "critic")
    assert len(set(points)) == len(points) == 4
    assert found[3] == ([], [])


def dropped() -> tuple[list[str], int]:
    import gc

    from megatron_muon.qk_clip.clip import QKClip

    begin()
    run = another(STIEFEL, **CLIP)
    run.losses(1)
    del run
    gc.collect()
    with log() as megatrons:
        return megatrons.write(1), sum(isinstance(each, QKClip) for each in gc.get_objects())


def test_a_dropped_optimizer_is_forgotten(pool: RankPool) -> None:
    assert pool.run(dropped, 1) == [([], 0)]


def on_some_ranks(mine: list[int], optimizer: dict[str, Any]) -> list[Any]:
    """A model over two tensor-parallel ranks of the run, with groups of its own, in training.

    The others have a model of their own, which is not: Megatron-Core builds optimizers on all ranks of a run together.
    """
    import megatron_muon

    megatron_muon.install()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    layout = Layout(tp=2)
    layout.initialize()
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for name in vars(groups):
        if name in ("tp_dp_cp", "intra_dist_opt"):  # of all ranks, as parallel_state has them
            setattr(groups, name, groups.mp)
        elif "dp" in name:
            setattr(groups, name, alone)
    trained = dist.get_rank() in mine
    (model,) = harness.build_model(layout, **(CLIP if trained else {**CLIP, "num_layers": 2, "init_method_std": 1.0}))
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(model.config, config, model, pg_collection=groups)
    update = get_megatron_optimizer(
        harness.optimizer_config(layout, **optimizer), [chunk], use_gloo_process_groups=False, pg_collection=groups
    )
    if not trained:
        chunk(torch.arange(16)[None], torch.arange(16)[None], torch.zeros(1, 1, 16, 16, dtype=torch.bool))
        return []
    batch = harness.COUNTING.tokens(0, 0)[None]
    mask = torch.ones(1, 1, 16, 16).tril() < 0.5
    found: list[Any] = []
    with log() as megatrons:
        for iteration in (1, 2):
            chunk.zero_grad_buffer()
            chunk(batch[:, :-1], torch.arange(16)[None], mask, labels=batch[:, 1:]).mean().backward()
            chunk.finish_grad_sync()
            update.step()
            found += [clip_of(chunk).max_logit.item(), int(clip_of(chunk).heads_clipped)]
            found += megatrons.write(iteration)
    return found


@pytest.mark.parametrize(
    "optimizer", [pytest.param({"name": "adam"}, marks=pytest.mark.slow), STIEFEL], ids=["adam", "stiefel"]
)
def test_a_model_on_some_ranks(pool: RankPool, optimizer: dict[str, Any]) -> None:
    """Its numbers are those that it has alone; nothing waits for the other ranks."""
    expected = pool.run(on_some_ranks, 2, [0, 1], optimizer)
    assert expected[0][0] > 0.05 and expected[0][1] > 0
    lines = [line for line in expected[1] if isinstance(line, str)]
    assert len(lines) == (4 if optimizer is STIEFEL else 2) and len(expected[0]) == 4
    assert pool.run(on_some_ranks, 4, [2, 3], optimizer) == [[], [], *expected]
