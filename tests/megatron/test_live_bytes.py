"""What a run holds after a step, every live tensor of it, is what the plan counts, for each way to keep its numbers."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.planner import GROUPS, TINY, Planner
from tests.megatron.test_plan_on_ranks import BUCKETS
from tests.pairwise import covering
from tests.pool import RankPool

WIDE = 64
"""Hidden size: so that what has no weights does not count."""

MODEL = {"hidden_size": WIDE, "kv_channels": WIDE // 4, "ffn_hidden_size": 96}
SIZES = [f"--{name.replace('_', '-')}={size}" for name, size in MODEL.items()]

MASTERS, MOMENTA, GRADIENTS = ("fp32", "remainder"), ("fp32", "bf16", "int8"), ("fp32", "bf16")
FORMS = [*itertools.product(MASTERS, MOMENTA, GRADIENTS)]
PAIRS = [(MASTERS[a], MOMENTA[b], GRADIENTS[c]) for a, b, c in covering([2, 3, 2])]
"""Enough of them to have each two together."""
LAYOUTS = {"plain": (Layout(), 1, []), "layer-wise": (Layout(layer_wise=True), 2, ["--use-distributed-optimizer"])}


def live_storages() -> dict[int, int]:
    """Bytes of all storages of live tensors in this process, by address; states of random numbers do not count."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    random = torch.get_rng_state().nbytes
    return {its.data_ptr(): its.nbytes() for its in storages if its.device.type == "cpu" and its.nbytes() != random}


def live_bytes(layout: Layout, forms: list[tuple[str, str, str]]) -> list[int]:
    """Runs on a rank: of a run after two steps, for each (masters, momentum, gradients)."""
    found = []
    for master, momentum, gradients in forms:
        before = live_storages()
        options = {"muon_master": master, "muon_momentum_dtype": momentum}
        ddp = {"grad_reduce_in_fp32": gradients == "fp32"}
        run = harness.start(layout, bf16=True, optimizer=options, ddp=ddp, **MODEL)
        run.losses(2)
        found.append(sum(size for address, size in live_storages().items() if address not in before))
        del run
    return found


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        pytest.param("layer-wise", PAIRS, id="layer-wise"),
        pytest.param("layer-wise", [each for each in FORMS if each not in PAIRS], id="rest", marks=pytest.mark.slow),
        pytest.param("plain", FORMS, id="plain", marks=pytest.mark.slow),
    ],
)
def test_live_bytes(pool: RankPool, planner: Planner, name: str, kept: list[tuple[str, str, str]]) -> None:
    layout, world, flags = LAYOUTS[name]
    ranks = pool.run(live_bytes, world, layout, kept)
    for number, (master, momentum, gradients) in enumerate(kept):
        forms = ["--muon-master", master, "--muon-momentum-dtype", momentum]
        forms += ["--grad-reduce-in-bf16"] if gradients == "bf16" else []
        rank = planner.document([*TINY, *GROUPS, *BUCKETS, *SIZES, "--bf16", *flags, *forms], world)["fullest_rank"]
        counted = sum(each["bytes"] for each in rank["bytes"] if "step" not in each["kind"])
        most = max(found[number] for found in ranks)
        assert most == pytest.approx(counted, rel=0.006), (master, momentum, gradients)
