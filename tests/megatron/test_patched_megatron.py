"""Megatron-Core with our git patches, on which nobody calls install(): it trains as through the plug-in's hooks."""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.launch import FLAGS, SCRIPT, records, train
from tests.launch import launch as forked
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN
from tests.patched import environment, patched_tree, search_path
from tests.pool import RankPool

TIMEOUT_S = 240
STEPS = 3
ALONE = "--muon-nesterov --qk-clip --qk-clip-threshold 0.01 --log-max-attention-logit --train-iters 4"
SCRIPT_FLAGS = f"--tensor-model-parallel-size 2 {ALONE}"
SPLIT = {"muon_gdn_in_proj": "split"}


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with patched_tree() as folder:
        yield folder


@pytest.fixture(scope="module")
def patched_pool(tree: Path) -> Iterator[RankPool]:
    """Ranks that import the patched sources."""
    pool = RankPool(forked=False)
    before = list(sys.path)
    sys.path[:0] = search_path(tree)  # new ranks get it from this process
    try:
        pool.run(source_of_megatron, 2)
    finally:
        sys.path[:] = before
    yield pool
    pool.close()


def source_of_megatron() -> str:
    import megatron.core

    return str(Path(megatron.core.__file__).parents[2])


def without_plugins() -> None:
    """What the patches that stand alone do; this package is found where it is asked for, and nobody has."""
    from megatron.core.datasets.utils import compile_helpers
    from megatron.core.optimizer import emerging_optimizers, get_emerging_optimizers, layer_wise_optimizer
    from megatron.training.arguments import add_megatron_arguments

    from megatron_muon import plugin

    def is_adams(*shape: int, **tags: bool) -> bool:
        weight = torch.nn.Parameter(torch.ones(shape))
        for name, value in tags.items():
            setattr(weight, name, value)
        adams = emerging_optimizers._is_nonlinear_or_embedding(weight)
        assert layer_wise_optimizer.is_managed_by_layer_wise_optimizer(weight) is not adams
        return adams

    assert not is_adams(4, 4) and not is_adams(4, 4, use_muon=True, skip_orthogonalization=False)
    assert is_adams(4, 4, skip_orthogonalization=True) and is_adams(4, 4, use_muon=False)
    assert is_adams(4) and is_adams(4, 4, is_embedding_or_output_parameter=True)
    compile_helpers()  # the wheel's: make would fail and end the process
    text = add_megatron_arguments(argparse.ArgumentParser()).format_help()
    assert "1.10 = 10%)" in " ".join(text.split()) and "%%" not in text
    numbered = layer_wise_optimizer.LayerWiseDistributedOptimizer._file_of_this_rank
    assert (
        numbered(SimpleNamespace(dp_cp=dist.group.WORLD), "a_1/optimizer_3.pt") == f"a_1/optimizer_{dist.get_rank()}.pt"
    )
    assert get_emerging_optimizers()["muon"].optimizer_cls.__name__ == "TensorParallelMuon"
    Layout(tp=2).initialize()
    tags = [
        (name, getattr(weight, "skip_orthogonalization", None))
        for name, weight in harness.build_model(Layout(tp=2), **GDN)[0].named_parameters()
    ]
    assert {name.rpartition("self_attention.")[2] for name, tag in tags if tag is not None} == {"in_proj.weight"}
    assert all(tag for name, tag in tags if name.endswith("in_proj.weight")) and not plugin.is_installed()


def test_fixes_without_this_package(patched_pool: RankPool) -> None:
    patched_pool.run(without_plugins, 2)


def losses(layout: Layout, native: bool, bf16: bool, model: dict[str, Any], optimizer: dict[str, Any]) -> Any:
    """Of each step, and what was hooked: with ``native`` by what the patched sources find by themselves."""
    from megatron_muon import plugin

    if native:
        from megatron.core import extension_points

        assert not plugin.is_installed()
        os.environ["MEGATRON_CORE_PLUGINS"] = "megatron_muon"
        extension_points._loaded = False  # as in a new process
        extension_points._called.clear()
    run = harness.start(layout, bf16=bf16, install=not native, optimizer=optimizer, **model)
    assert plugin.is_installed()
    replaced = sum(undo.func in (setattr, delattr) for undo in plugin._PATCHES._undo)
    return run.losses(STEPS), replaced


@pytest.mark.parametrize(
    "layout,bf16,model,optimizer",
    [
        pytest.param(Layout(tp=2), False, GDN, {}, marks=pytest.mark.slow),
        (Layout(tp=2), False, GDN, SPLIT),
        (Layout(layer_wise=True, ddp_buffers=True), True, {"num_moe_experts": 2, "moe_ffn_hidden_size": 32}, {}),
    ],
    ids=["gated_delta_net", "split", "layer_wise"],
)
def test_same_losses_as_through_the_hooks(
    pool: RankPool, patched_pool: RankPool, layout: Layout, bf16: bool, model: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    (expected, hooked), *_ = pool.run(losses, 2, layout, False, bf16, model, optimizer)
    (found, replaced), *_ = patched_pool.run(losses, 2, layout, True, bf16, model, optimizer)
    assert found == expected and found[-1] != found[0]
    assert (hooked > 5, replaced) == (True, 6)  # the fields of OptimizerConfig, and its subclasses


def test_a_script_trains_without_install(tree: Path, tmp_path: Path) -> None:
    """Flags, config, QK-clip, and record: an unedited script on one rank."""
    expected = train(*ALONE.split(), log=tmp_path / "hooked.jsonl", run=functools.partial(forked, ranks=1))
    log = tmp_path / "native.jsonl"
    output = launch(tree, *FLAGS.split(), *ALONE.split(), "--optimizer", "muon", "--muon-log-jsonl", str(log), ranks=1)
    points = records(log)
    assert [point["losses"]["lm loss"] for point in points] == expected
    assert output.count("hooks natively; hooked: megatron.core.optimizer.optimizer_config:OptimizerConfig.__data") == 1
    assert "QK-clip: 8 heads in 2 layers are clipped above 0.01" in output
    assert all(point["heads_clipped"] for point in points)


@pytest.mark.slow
def test_checkpoints_move_between_the_two(tree: Path, tmp_path: Path) -> None:
    """What was saved without install() is read through the hooks, and the other way."""
    folder, log = tmp_path / "checkpoint", tmp_path / "native.jsonl"
    expected = train(*SCRIPT_FLAGS.split(), log=tmp_path / "whole.jsonl")
    save = f"--save {folder} --load {folder} --save-interval 1"
    native = f"{SCRIPT_FLAGS} {save} --optimizer muon --muon-log-jsonl {log}"
    launch(tree, *FLAGS.split(), *native.split(), "--exit-interval", "1")
    train(*SCRIPT_FLAGS.split(), *save.split(), "--exit-interval", "2", log=log)
    launch(tree, *FLAGS.split(), *native.split())
    points = records(log)
    assert [point["losses"]["lm loss"] for point in points] == expected


def launch(tree: Path, *arguments: str, ranks: int = 2) -> str:
    """``torchrun`` on the patched sources, with CPU ranks; the output."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = Path(__file__).parent / "scripts" / "on_cpu.py"
    result = subprocess.run(
        [*start, str(script), str(SCRIPT), *arguments],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout
