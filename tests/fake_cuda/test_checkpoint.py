"""Checkpoints on fake CUDA: state is saved where it lies, and what is read goes to the device."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.checkpoint.param_state import ParamState
from megatron_muon.checkpoint.request import Request
from megatron_muon.cpu.optimizers import GroupStepAdamW
from megatron_muon.plugin.optimizer_state import param_states
from tests.fake_cuda.megatron import FIRST_STEP, GPU, STEP, Allowed, gpus, outcomes, start, step
from tests.fake_cuda.world import World
from tests.megatron import harness
from tests.megatron.harness import CHECKPOINT_METADATA, Layout, Run
from tests.pool import RankPool
from tests.slow import with_slow

Case = tuple[Layout, dict[str, Any], dict[str, Any], dict[str, Any]]

BF16 = {"bf16": True}
SHARDED = {"layer_wise": True, "ddp_buffers": True}
SPLIT = {"num_query_groups": 2, "attention_output_gate": True}
ACCEPT = {"muon_ckpt_changes": "accept"}  # the first rank has heard of no weights but its own
COMPACT = {"muon_master": "remainder", "muon_momentum_dtype": "int8"}
ADAM = {"muon_param_rule": ("*linear_proj.weight=adam",), **ACCEPT}

CASES: dict[str, Case] = {
    "plain": (Layout(tp=2), BF16, {}, {}),
    "layer-wise": (Layout(tp=2, **SHARDED), BF16, {}, ACCEPT),
    "second moments": (Layout(tp=2), {}, {"name": "adaptive_muon"}, {}),
    "pipeline": (Layout(pp=2), BF16, {}, ACCEPT),
    "remainders": (Layout(tp=2), BF16, COMPACT, {}),
    "remainders to float32": (Layout(**SHARDED), BF16, COMPACT, {**ACCEPT, "muon_master": "fp32"}),
    "from Muon to Adam": (Layout(tp=2), BF16, {}, ADAM),
}
"""Layout, model, options of the run that saves, and what the one that loads has in their place."""

COPIES = [
    Allowed("megatron_muon/checkpoint/param_state.py:saved", "what is kept in other forms is put together on the host"),
    Allowed("megatron_muon/checkpoint/weights.py:sums_of_parts", "and goes to the device for its sum"),
    Allowed("megatron_muon/optimizers/storage.py:write", "and to be kept, when it was read"),
    Allowed("megatron_muon/checkpoint/request.py:_take", "a local checkpoint has it on the host, where it was saved"),
]
SUMS = Allowed("megatron_muon/checkpoint/fingerprint.py:fingerprints", "sums of bits, all at once, for the record", 0)
OBJECTS = Allowed("megatron_muon/agree.py:to_first", "the record is put together on the first rank")
TO_HOST = Allowed(
    "megatron/core/dist_checkpointing/tensor_aware_state_dict.py:copy_tensors_to_cpu", "Megatron-Core's, not the save's"
)


def there_and_back(case: Case, rank: int, told: list[Any]) -> None:
    layout, model, options, changes = case
    with gpus(rank, ranks=4, told=told) as world:
        run = start(layout, optimizer=options, early=True, **model)
        step(run)
        before = world.watch.peak = world.watch.live
        with world.refusing([SUMS, OBJECTS, *COPIES]):
            state = _asked(run)
        copied = _check_in_place(run, state["optimizer"])
        assert (copied > 0) == (options is COMPACT)
        largest = max(tensor.numel() for tensor in _tensors(run))
        assert world.watch.live == before and world.watch.peak - before < 24 * largest, "one weight's at a time"
        saved = _kept(state)
        with world.refusing([TO_HOST]):
            saved.copy_tensors_to_cpu()
            saved.restore_tensor_device()
        with world.refusing(STEP):
            step(run)  # what is written behind it is a copy

        run = start(layout, optimizer={**options, **changes}, early=True, **model)
        dtypes = [tensor.dtype for tensor in _tensors(run)]
        with world.refusing([SUMS, OBJECTS, *COPIES]):
            state = _asked(run, is_loading=True)
            loaded = saved.to_state_dict(state, algo="atomic")
            for chunk in run.chunks:
                harness.load_model(chunk, loaded["model"])
            run.optimizer.load_state_dict(loaded["optimizer"])
        found = list(_tensors(run))
        assert all(tensor.device == GPU for tensor in found)
        assert [tensor.dtype for tensor in found] == dtypes
        with world.refusing(FIRST_STEP):
            step(run)


def _asked(run: Run, **how: Any) -> dict[str, Any]:
    state = harness.model_state(run.chunks)
    return {**state, "optimizer": run.optimizer.sharded_state_dict(state, metadata=CHECKPOINT_METADATA, **how)}


def _kept(state: dict[str, Any]) -> Any:
    """A local checkpoint, see :mod:`tests.megatron.test_local_checkpoints`: what is saved, by Megatron-Core's code."""
    from megatron.core.dist_checkpointing import tensor_aware_state_dict as module

    with patch.object(module, "HAVE_NVRX", True):
        return module.MCoreTensorAwareStateDict.from_state_dict({**state, "iteration": 1}, algo="atomic")[0]


def _check_in_place(run: Run, saved: Any) -> int:
    """State is described where it lies: no second copy of it is on the device, and on the host none but of forms that
    checkpoints do not have, whose bytes are returned.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    memory = {tensor.untyped_storage().data_ptr() for tensor in _tensors(run)}
    parts = [part for part in nested_values(saved) if isinstance(part, ShardedTensor)]
    assert parts and all(part.data.dtype == part.dtype for part in parts)
    copies = [part for part in parts if part.data.device != GPU]
    assert all(
        re.search(r"state\.(fp32_param|momentum_buffer)\..*(qkv|proj|fc1|fc2)\.weight", part.key) for part in copies
    )
    there = [part.data.untyped_storage().data_ptr() for part in parts if part.data.device == GPU and part.data.numel()]
    assert memory.issuperset(there)
    return sum(part.data.nbytes for part in copies)


def _tensors(run: Run) -> Iterable[torch.Tensor]:
    for held in param_states(run.optimizer, create=True):
        yield from (tensor for _, tensor in sorted(held.tensors.items()))


def _crossed(name: str) -> dict[str, str]:
    def on_ranks(case: Case) -> None:
        told: list[Any] = []
        for rank in (0, 3) if case[3] is ACCEPT else (0,):
            there_and_back(case, rank, told)

    return outcomes({name: CASES[name]}, on_ranks)


@pytest.mark.parametrize("case", with_slow(CASES, "plain", "remainders"))
def test_saved_and_loaded_on_the_device(pool: RankPool, case: str) -> None:
    failed = pool.run(_crossed, 1, case)[0][case]
    assert not failed, failed


@pytest.mark.parametrize("kind", ["torch", "fused"])
def test_steps_that_a_graph_counts_are_on_the_device(kind: str) -> None:
    """A number of the host would be the graph's for ever: torch's Adam refuses it, TransformerEngine's takes it."""
    with World() as world:
        params = [world.parameter(3, 4) for _ in range(2)]
        inner: Any = torch.optim.AdamW(params, capturable=True) if kind == "torch" else GroupStepAdamW(params)
        if kind == "torch":
            inner.step()
        inner.capturable = True  # as TransformerEngine's has it; torch's has it in its groups
        request = Request.__new__(Request)
        request.held = [ParamState(param, inner, inner.param_groups[0], param, None) for param in params]
        request._set_steps(7)
        counts = (
            [inner.state[param]["step"] for param in params] if kind == "torch" else [inner.param_groups[0]["step"]]
        )
        assert all(count.device == GPU for count in counts)
        if kind == "torch":
            with world.refusing():
                inner.step()


def test_state_on_the_host_is_put_together_with_weights_on_the_device() -> None:
    """As with ``--muon-offload`` and asleep: it stays there, and so does what is read into it."""
    with World() as world:
        param = world.parameter(6, 300, dtype=torch.bfloat16)
        muon = Muon([param], master="remainder", momentum_dtype="int8")
        muon._init_group(muon.param_groups[0], skip_non_grad_params=False)
        state = muon.state[param]
        state |= {name: value.cpu() for name, value in state.items() if isinstance(value, torch.Tensor)}
        held = ParamState(param, muon, muon.param_groups[0], param, None)
        held.keep_apart()
        own = {id(value) for value in state.values()}
        assert {value.device.type for value in held.saved.values()} == {"cpu"}
        assert own.isdisjoint(map(id, held.saved.values())), "a later step would change what is saved"
        held.take()
        assert own == {id(value) for value in state.values()}
