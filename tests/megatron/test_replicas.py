"""Whether copies of weights and of optimizer state have the same bits: none differ in healthy runs, and one bit is
enough to be named on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon.plugin import replicas
from megatron_muon.plugin.replicas import fingerprint
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.pool import RankPool

MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16, "moe_router_enable_expert_bias": True}
MOE |= {"moe_router_score_function": "sigmoid", "moe_token_dispatcher_type": "alltoall"}


def differing(run: Run) -> list[str]:
    from megatron_muon.plugin.groups import groups_of_model, ranks_of
    from megatron_muon.plugin.replicas import check_replicas

    return check_replicas(run.optimizer, run.chunks, groups_of_model(None, run.chunks), ranks_of(None))


def between(run: Run) -> list[list[str]]:
    """Have each of the run's steps compare replicas, as it begins; what was found, step by step."""
    found: list[list[str]] = []
    prepare = run.optimizer.prepare_grads

    def compare() -> Any:
        found.append(differing(run))
        return prepare()

    run.optimizer.prepare_grads = compare
    return found


def change(run: Run, name: str, slot: str, by: int) -> None:
    """One bit of a tensor of this rank, the lowest of its last element, which a second call flips back; a count of
    steps by one."""
    from megatron_muon.optimizers.handled import STEP
    from megatron_muon.plugin.optimizer_state import param_states
    from megatron_muon.plugin.replicas import _named, _state

    param = next(param for found, param in _named(run.chunks) if found == name)
    if slot == "weight":
        tensor = param.detach()
    else:
        held = next(each for each in param_states(run.optimizer, refuse=False) if each.param is param)
        if slot == STEP:
            held.group[STEP] += by
            return
        tensor = _state(held)[slot]
    tensor.view(-1)[-1:].view(torch.uint8)[0] ^= 1


def scene(layout: Layout, changes: list[tuple[str, str, int]], **options: Any) -> list[list[str]]:
    """What differs in three steps; with each of ``changes`` (weight, slot, rank) alone; and without them again."""
    run = harness.start(layout, early=True, **options)
    found = between(run)
    run.losses(3)
    for name, slot, rank in changes:
        if dist.get_rank() == rank:
            change(run, name, slot, 1)
        found.append(differing(run))
        if dist.get_rank() == rank:
            change(run, name, slot, -1)
    return [*found, differing(run)]


FC1, NORM = "decoder.layers.1.mlp.linear_fc1.weight", "decoder.final_layernorm.weight"
EMBEDDING, ROUTER = "embedding.word_embeddings.weight", "decoder.layers.1.mlp.router.weight"
EXPERT = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"
OWNED = Layout(layer_wise=True, ddp_buffers=True)

CASES: dict[str, tuple[int, Layout, dict[str, Any], list[tuple[str, str, int, str]]]] = {
    # weights and state of float32, and of bfloat16 with masters: a part, or all, over data and tensor parallel ranks
    "tp2_sp_dp2": (
        4,
        Layout(tp=2, sp=True),
        {"bf16": True},
        [
            (FC1, "weight", 3, "1, 3"),
            (FC1, "momentum_buffer", 0, "0, 2"),
            (FC1, "fp32_param", 1, "1, 3"),
            (NORM, "weight", 2, "0, 1, 2, 3"),
            (NORM, "exp_avg", 1, "0, 1, 2, 3"),
            (NORM, "exp_avg_sq", 3, "0, 1, 2, 3"),
            (NORM, "step", 0, "0, 1, 2, 3"),
            (EMBEDDING, "fp32_param", 2, "0, 2"),
        ],
    ),
    "tp2_dp2_owned": (
        4,
        Layout(tp=2, sp=True, layer_wise=True, ddp_buffers=True),
        {"bf16": True},
        [(FC1, "weight", 3, "1, 3"), (NORM, "weight", 2, "0, 1, 2, 3"), (NORM, "exp_avg_sq", 0, "0, 1")],
    ),
    "ep2": (
        2,
        Layout(ep=2),
        {**MOE},
        [(ROUTER, "momentum_buffer", 1, "0, 1"), (ROUTER.replace("weight", "expert_bias"), "weight", 1, "0, 1")],
    ),
    "pp2_tied": (
        2,
        Layout(pp=2),
        {"tied": True},
        [(EMBEDDING, "weight", 0, "0, 1"), (EMBEDDING, "exp_avg", 0, "0, 1")],
    ),
}


# State that ranks own is compared as the first case compares all state, among fewer ranks.
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow if each == "tp2_dp2_owned" else ()) for each in CASES]
)
def test_one_bit_is_named_on_all_ranks(pool: RankPool, name: str) -> None:
    ranks, layout, options, changes = CASES[name]
    results = pool.run(scene, ranks, layout, [each[:3] for each in changes], **options)
    assert results == [results[0]] * ranks
    assert [*results[0][:3], results[0][-1]] == [[]] * 4
    for (weight, slot, rank, among), found in zip(changes, results[0][3:-1], strict=True):
        shown = "the embedding that pipeline stages share" if options.get("tied") else weight
        where = f"rank {rank} of {among}" if among.count(",") > 1 else f"ranks {among}"
        if slot == "step":  # all weights of a param group count together
            assert len(found) > 1
            found = [each for each in found if each.startswith(weight)]
        assert found == [f"{shown}: {slot} ({where})"]


def test_any_bit_and_any_order_counts() -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64):
        tensor = torch.randn(12, 6, generator=generator, dtype=torch.float64).mul(50).to(dtype)
        number, bits = int(fingerprint(tensor)), tensor.view(-1).view(torch.uint8)
        for place in range(0, len(bits), 7):
            for bit in range(8) if dtype != torch.bool else [0]:
                bits[place] ^= 1 << bit
                assert int(fingerprint(tensor)) != number
                bits[place] ^= 1 << bit
        if dtype != torch.bool:
            assert int(fingerprint(tensor.flip(0))) != number != int(fingerprint(tensor.flip(1)))
        assert int(fingerprint(tensor)) == number
    steps = torch.arange(3000)
    changed = steps.clone()
    changed[5:8] += torch.tensor([1, -2, 1])  # nothing to a sum with factors in arithmetic sequence
    assert int(fingerprint(changed)) != int(fingerprint(steps))


def test_pieces_have_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_PIECE", 8)
    tensor = torch.arange(40, dtype=torch.int16)
    swapped = torch.cat([tensor[8:16], tensor[:8], tensor[16:]])
    assert int(fingerprint(swapped)) != int(fingerprint(tensor))


def test_many_differences_are_not_all_told() -> None:
    found = [(0, f"weight{number}", "weight", number) for number in range(32)]
    other = [(0, name, slot, number + 1) for _, name, slot, number in found]
    told = replicas._told({0: (found, 8), 1: (found, 8), 2: (other, 8)})
    assert told[0] == "weight0: weight (rank 2 of 0, 1, 2)"
    assert told[32:] == ["and 8 more"]


def test_offsets_of_heads_are_no_copies(pool: RankPool) -> None:
    """Each tensor-parallel rank has those of its own heads, although nothing marks them."""
    assert pool.run(scene, 2, Layout(tp=2), [], softmax_type="learnable", replicas=False) == [[[]] * 4] * 2
