"""What one rank alone meets ends all ranks of its model, and no others."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_muon.agree import ranks_with
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.muon import Muon
from megatron_muon.plugin.optimizer_state import leaves
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool


def ranks_of_layout(layout: Layout) -> list[int]:
    from megatron_muon.plugin.groups import ranks_of

    layout.initialize()
    return ranks_of(None).gather(dist.get_rank)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2, cp=2), Layout(tp=2, pp=2, ep=2, etp=1)], ids=repr)
def test_the_ranks_of_parallel_state(pool: RankPool, layout: Layout) -> None:
    for found in pool.run(ranks_of_layout, 4, layout):
        assert sorted(found) == [0, 1, 2, 3]


def ranks_of_collections() -> dict[str, Any]:
    """Ranks 0 and 2 have a model, and ranks 1 and 3, each in groups of its own."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_muon.plugin.groups import ranks_of

    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    alone = [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]
    pair = pairs[dist.get_rank() % 2]
    collections = {
        "replicas": {"tp": alone, "pp": alone, "mp": alone, "dp_cp": pair},
        "no mp": {"tp": alone, "pp": pair, "dp": alone},
        "not divided": {"mp": None, "dp": pair},
        "context": {"mp": alone, "dp": alone, "cp": pair},
        "nothing": {"tp": alone, "dp_cp": pair},
    }
    answer: dict[str, Any] = {}
    for name, groups in collections.items():
        try:
            answer[name] = ranks_of(ProcessGroupCollection(**groups)).gather(dist.get_rank)
        except ConfigError as error:
            answer[name] = str(error)
    return answer


def test_the_ranks_of_a_model_with_groups_of_its_own(pool: RankPool) -> None:
    for rank, answer in enumerate(pool.run(ranks_of_collections, 4)):
        mine = [rank % 2, rank % 2 + 2]
        assert answer["replicas"] == answer["no mp"] == answer["not divided"] == mine
        assert "pg_collection without dp_cp" in answer["context"]
        assert "pg_collection without mp" in answer["nothing"]


# --- a failure of one rank, or of one stage --------------------------------------------------------------------------


def failure(work: Callable[[], Any]) -> tuple[str, str, set[int], str]:
    """Type and message of what ``work`` raises, the ranks that have it, and what is said about the first."""
    try:
        work()
    except Exception as error:
        notes = getattr(error, "__notes__", [""])
        return type(error).__name__, str(error), set(ranks_with(error)), notes[0].partition(":")[0]
    return "", "", set(), ""


def build(layout: Layout, options: dict[str, Any]) -> tuple[str, str, set[int], str]:
    return failure(lambda: harness.start(layout, **options))


def test_a_refusal_that_one_stage_meets(pool: RankPool) -> None:
    """Buffers that were laid out by other options than the optimizer's, for a weight of the second stage."""
    options = {"optimizer": {"muon_param_rule": ("decoder.layers.2.*linear_fc1.weight=adam",)}}
    results = pool.run(build, 4, Layout(pp=2, layer_wise=True), options)
    assert len({message for _, message, _, _ in results}) == 1
    for rank, (kind, message, ranks, note) in enumerate(results):
        assert (kind, ranks) == ("ConfigError", {0, 1, 2, 3})
        assert ".linear_fc1.weight: " in message and "before the weight's tags were set" in message
        assert note == ("" if rank >= 2 else "on rank 2")


PLACES = [
    "megatron_muon.plugin.ownership.annotate",
    "megatron_muon.plugin.factory.annotate",
    "megatron_muon.plugin.factory.group_overrides",
    "megatron.core.optimizer._get_qkv_split_shapes",
    "megatron.core.optimizer._create_emerging_optimizer",
    "megatron_muon.plugin.factory.param_states",
    "megatron_muon.plugin.factory._planned",
    "megatron_muon.plugin.tables._is_first",
]
"""From the first routing decision to the report, with Megatron-Core's own part between."""


def break_on_rank_1(place: str, layout: Layout) -> tuple[str, str, set[int], str]:
    """A bug in ``place`` that one rank meets."""
    import megatron_muon

    megatron_muon.install()
    broken = mock.patch(place, side_effect=KeyError("in_proj"))
    with broken if dist.get_rank() == 1 else contextlib.nullcontext():
        return failure(lambda: harness.start(layout))


@pytest.mark.parametrize("place", PLACES)
def test_a_bug_that_one_rank_meets(pool: RankPool, place: str) -> None:
    results = pool.run(break_on_rank_1, 2, place, Layout(layer_wise=True), timeout=30)
    assert results == [("KeyError", "'in_proj'", {0, 1}, note) for note in ("on rank 1", "")]


# --- ranks that would compute other bits -----------------------------------------------------------------------------

GOOD = "megatron_muon.optimizers.engines.candidates"


def builds() -> list[tuple[str, str, str]]:
    """Of replicas that exchange nothing in a step: what is refused, what is told, and the kernels that are taken."""
    from megatron_muon.orthogonalize.backends import Candidate
    from megatron_muon.orthogonalize.products import TorchProducts

    rank = dist.get_rank()

    class Fast(TorchProducts):
        name = "fast"

    def offering(fast: float, torchs: float) -> Any:
        offers = [Candidate("triton", Fast(), "", fast), Candidate("torch", TorchProducts(), "", torchs)]
        offers = [each for each in offers if each.seconds] or [Candidate("torch", TorchProducts(), "")]
        return mock.patch(GOOD, return_value=sorted(offers, key=lambda each: each.seconds))

    cases: list[tuple[Any, dict[str, Any]]] = [
        (contextlib.nullcontext(), {}),
        (mock.patch.object(torch, "__version__", f"2.6.{rank}"), {}),
        (contextlib.nullcontext(), {"muon_num_ns_steps": 5 + rank}),
        (offering(1.0, 2.0) if rank == 0 else offering(0.0, 0.0), {}),
        (offering(1.0, 2.0) if rank == 0 else offering(4.0, 2.0), {}),
        (offering(1.0, 2.0) if rank == 0 else offering(2.5, 2.0), {}),
    ]
    return [build_told(Layout(), *case) for case in cases]


def build_told(layout: Layout, context: Any, options: dict[str, Any]) -> tuple[str, str, str]:
    report, runs = io.StringIO(), list[harness.Run]()
    with context, contextlib.redirect_stdout(report):
        _, message, ranks, _ = failure(lambda: runs.append(harness.start(layout, optimizer=options, num_layers=1)))
    assert not message or ranks == {0, 1}, message
    lines = [line for line in report.getvalue().splitlines() if line.startswith(("products: ", "DEVICES"))]
    muons = [leaf.optimizer for run in runs for leaf, _ in leaves(run.optimizer) if isinstance(leaf.optimizer, Muon)]
    names = {engine.orthogonalizer.products.name for muon in muons for engine in muon.engines}
    return message, " ".join(lines), " ".join(names)


def test_replicas_compute_the_same_bits_or_nothing(pool: RankPool) -> None:
    first, second = pool.run(builds, 2, timeout=60)
    assert [(message, names) for message, _, names in first] == [(message, names) for message, _, names in second]
    _, version, options, absent, slower, faster = first
    assert version[0].startswith("Ranks of one model differ: torch is 2.6.0 on ranks 0, 2.6.1 on ranks 1. Copies of")
    assert options[0].startswith("Ranks of one model differ: --muon-num-ns-steps is 5 on ranks 0, 6 on ranks 1. Copies")
    assert [each[2] for each in (absent, slower, faster)] == ["torch", "torch", "fast"]
    assert absent[1].endswith("; on all 2 ranks (best for each: triton on ranks 0, torch on ranks 1)")
    assert faster[1].endswith("; on all 2 ranks (best for each: triton on ranks 0, torch on ranks 1)")


def starts_where_one_is_slow() -> tuple[str, set[torch.dtype]]:
    report = io.StringIO()
    slow = mock.patch("megatron_muon.optimizers.engines.slow_bfloat16", lambda *_: "slow" if dist.get_rank() else "")
    with slow, contextlib.redirect_stdout(report):
        run = harness.start(Layout(), num_layers=1, optimizer={"muon_fp32_matmul_prec": "medium"})
    lines = [line for line in report.getvalue().splitlines() if line.startswith(("Newton-Schulz in", "products: "))]
    muons = [leaf.optimizer for leaf, _ in leaves(run.optimizer) if isinstance(leaf.optimizer, Muon)]
    return " | ".join(lines), {engine.orthogonalizer.dtype for muon in muons for engine in muon.engines}


def test_one_rank_without_fast_bfloat16_makes_all_iterate_in_float32(pool: RankPool) -> None:
    (line, dtypes), (_, others) = pool.run(starts_where_one_is_slow, 2, timeout=60)
    assert line.startswith("Newton-Schulz in float32: on rank 1 slow | products: ") and "float32 on cpu" in line
    assert dtypes == others == {torch.float32}


def build_with_other_plans(layout: Layout) -> str:
    from megatron_muon.engine.step import StepEngine

    return build_told(layout, mock.patch.object(StepEngine, "digest", lambda *_: bytes([dist.get_rank()])), {})[0]


@pytest.mark.parametrize("layout,group", [(Layout(tp=2), "tensor"), (Layout(layer_wise=True), "data")])
def test_plans_are_compared_when_the_optimizer_is_built(pool: RankPool, layout: Layout, group: str) -> None:
    (message,) = set(pool.run(build_with_other_plans, 2, layout, timeout=60))
    assert message.startswith(f"Ranks 0-1, one {group}-parallel group, plan different steps: their weights,")


# --- a model on some of the ranks ------------------------------------------------------------------------------------

MEMBERS = (1, 3)


def train_on_some_ranks(layer_wise: bool, wrong_on: int | None) -> Any:
    """Ranks 1 and 3 hold copies of a model, in groups of its own; 0 and 2 do something else with each other.

    Returns:
        of the others, their sum; of the members, what has failed, or the losses, the first of the weights, and how many
        weights are in the record of a checkpoint.
    """
    import megatron_muon

    megatron_muon.install()
    layout = Layout(layer_wise=layer_wise)
    layout.initialize()
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    rank = dist.get_rank()
    members, others = dist.new_group(list(MEMBERS)), dist.new_group([0, 2])
    alone = [dist.new_group([each]) for each in range(4)][rank]
    if rank not in MEMBERS:
        found = torch.tensor([rank])
        dist.all_reduce(found, group=others)
        return found.item()
    one = dict.fromkeys(("tp", "pp", "mp", "cp", "ep", "expt_tp", "tp_ep_pp"), alone)
    many = dict.fromkeys(("dp", "dp_cp", "expt_dp", "intra_dp_cp", "intra_expt_dp", "intra_dist_opt"), members)
    groups = ProcessGroupCollection(**one, **many)
    rule = {"muon_param_rule": ("*.linear_fc2.weight=adam",)} if rank == wrong_on else {}

    def train() -> Any:
        (chunk,) = harness.wrap(harness.build_model(layout, num_layers=2), layout, groups=groups)
        config = harness.optimizer_config(layout, **rule)
        optimizer = get_megatron_optimizer(config, [chunk], pg_collection=groups)
        losses = []
        # Megatron-Core's layer-wise optimizer sums the gradient norm over all ranks of the run: it is only built.
        for _ in range(0 if layer_wise else 3):
            batch = next(iter(harness.COUNTING.micro_batches(0, rank, 1, 1)))
            sequence = batch["tokens"].shape[1]
            positions, mask = torch.arange(sequence)[None], torch.ones(1, 1, sequence, sequence).tril() < 0.5
            chunk.zero_grad_buffer()
            loss = chunk(batch["tokens"], positions, mask, labels=batch["labels"]).float().mean()
            loss.backward()
            chunk.finish_grad_sync()
            optimizer.step()
            losses.append(loss.item())
        model = {"model": harness.unwrap(chunk).sharded_state_dict(metadata={"dp_cp_group": members})}
        saved = optimizer.sharded_state_dict(model, metadata=harness.CHECKPOINT_METADATA)
        weights = torch.cat([param.detach().flatten() for param in chunk.parameters()])
        record = saved["record"].data
        return losses, weights.double().sum().item(), record and len(record["weights"])

    result: list[Any] = []
    problem = failure(lambda: result.append(train()))
    return result[0] if result else problem


@pytest.mark.parametrize("layer_wise", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_with_groups_of_its_own(pool: RankPool, layer_wise: bool) -> None:
    """The others need not come to anything, when it is built, trained or saved."""
    results = pool.run(train_on_some_ranks, 4, layer_wise, None)
    assert results[0] == results[2] == 2
    assert len(results[1]) == 3, results[1]
    (losses, weights, recorded), (other_losses, other_weights, other_recorded) = results[1], results[3]
    assert weights == other_weights
    if not layer_wise:
        assert losses[-1] < losses[0] and other_losses[-1] < other_losses[0]
    assert recorded > 10 and other_recorded is None, "the first rank has the record"


def test_a_model_with_groups_of_its_own_fails_by_itself(pool: RankPool) -> None:
    """Rank 3 alone has a rule, of which DDP's buffers know nothing."""
    results = pool.run(train_on_some_ranks, 4, True, 3)
    assert results[0] == results[2] == 2
    assert results[1][0] == results[3][0] == "ConfigError"
    assert results[1][2] == results[3][2] == {1, 3}


# --- checkpoints -----------------------------------------------------------------------------------------------------

CHECKPOINTS = "megatron_muon.checkpoint"
SAVING = [
    "megatron_muon.plugin.canonical_state.param_states",
    f"{CHECKPOINTS}.saving.places_of",
    f"{CHECKPOINTS}.weights.sums_of",
    f"{CHECKPOINTS}.saving.layout_text",
]
LOADING = [
    "megatron_muon.plugin.canonical_state.param_states",
    f"{CHECKPOINTS}.saving.places_of",
    f"{CHECKPOINTS}.stored.read_metadata",
    f"{CHECKPOINTS}.request.choose",
    "megatron.core.dist_checkpointing.strategies.torch.TorchDistLoadShardedStrategy.load",
    f"{CHECKPOINTS}.weights.sums_of",
    f"{CHECKPOINTS}.request._take",
    f"{CHECKPOINTS}.weights.fingerprints",
    f"{CHECKPOINTS}.request.numbers_of",
]
OF_FILES = (LOADING[2], LOADING[4])
"""Where what is read is to blame, and the error says which checkpoint it is."""


def save_and_load(folder: str) -> list[tuple[str, tuple[str, str, set[int], str]]]:
    """What comes of a bug on rank 1 in each of these places; then of none."""
    run = harness.start(Layout(layer_wise=True), num_layers=1)
    run.losses(1)
    answers = []

    def attempt(place: str, work: Callable[[], Any]) -> None:
        wrong = dist.get_rank() == 1 and place != ""
        error = OSError(5, "Input/output error")
        with mock.patch(place, side_effect=error) if wrong else contextlib.nullcontext():
            answers.append((place, failure(work)))

    for place in SAVING:
        attempt(place, lambda: run.optimizer.sharded_state_dict(harness.model_state(run.chunks)))
    attempt("", lambda: harness.save_run(run, folder))
    for place in [*LOADING, ""]:
        attempt(place, lambda: harness.load_run(run, folder))
    return answers


def test_a_bug_that_one_rank_meets_with_a_checkpoint(pool: RankPool, tmp_path: Path) -> None:
    for answers in pool.run(save_and_load, 2, str(tmp_path / "checkpoint")):
        assert [place for place, _ in answers] == [*SAVING, "", *LOADING, ""]
        for place, (kind, message, ranks, _) in answers:
            assert (place, ranks) == (place, {0, 1} if place else set())
            assert ("Input/output error" in message) == bool(place)
            assert kind == ("CheckpointError" if place in OF_FILES else "OSError" if place else "")


def save_over(folder: str) -> tuple[str, str, set[int], str]:
    from megatron.core import dist_checkpointing

    run = harness.start(Layout(), num_layers=1)
    state = run.optimizer.sharded_state_dict(harness.model_state(run.chunks))
    return failure(lambda: dist_checkpointing.save({"optimizer": copy.deepcopy(state)}, folder))


def test_storage_that_fails_the_first_rank_alone(pool: RankPool, tmp_path: Path) -> None:
    """It takes the marks of an old checkpoint away for all; here one of them is no file."""
    (tmp_path / ".metadata").mkdir()
    first, second = pool.run(save_over, 2, str(tmp_path), timeout=30)
    assert first[:3] == second[:3]
    assert (first[0], first[2]) == ("IsADirectoryError", {0, 1})
