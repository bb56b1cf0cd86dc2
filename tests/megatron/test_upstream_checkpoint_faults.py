"""What fails or goes wrong with Megatron-Core 0.19.2's own Muon at saving and loading, each by its name, with ours.

Those that are a layout that reads what another has written are cases of ``test_checkpoints.py``:

- ``dense_bf16-dp2_layer_wise-to-tp2`` and ``-to-one``: Adam's buckets, "Global shape mismatch";
- ``dense_bf16-tp2-to-dp2_layer_wise`` and ``-to-dp2_layer_wise_older``: KeyError ``optimizer.state.param.*``;
- ``dense_bf16-dp2_layer_wise_older-to-dp2_layer_wise_older``: under gloo, ``all_gather`` of tensors of different sizes;
- ``experts-ep2-to-one``: lists of param groups of different lengths;
- ``latent_attention_fused``: the fused weight is saved as two, and is not found among the model's tensors;
- ``experts_of_two_copies``: nothing was shared out, and each copy of an expert had an owner of its own, which knew half
  of the gradients.

Layer-wise checkpoints of ``--ckpt-format torch`` with the parameter layout, at whose saving Megatron-Core fails, are
refused: ``test_arguments.py::test_refusals``.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import contents, differences
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import MOE
from tests.pool import RankPool

FULLY = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
BFLOAT16 = 3e-2
"""Other layouts round activations differently."""


@contextlib.contextmanager
def models(change: Callable[[str, torch.nn.Parameter], None]) -> Iterator[None]:
    """Models that are changed before DDP and the optimizer see them."""
    original = harness.build_model

    def build_model(*args: Any, **kwargs: Any) -> list[Any]:
        chunks = original(*args, **kwargs)
        for chunk in chunks:
            for name, param in chunk.named_parameters():
                change(name, param)
        return chunks

    with mock.patch.object(harness, "build_model", build_model):
        yield


# --- one copy of dense weights, several of experts -------------------------------------------------------------------

ONE_COPY = Layout(tp=2, etp=1, sp=True)
ONE_COPY_LAYER_WISE = Layout(tp=2, etp=1, sp=True, layer_wise=True)


def norms_and_owners(layout: Layout, undivided: bool, **options: Any) -> tuple[list[float], list[str]]:
    """Gradient norms of two steps, and the expert weights that this rank updates."""
    from megatron_muon.plugin.optimizer_state import param_states

    with models(mark_experts_undivided) if undivided else contextlib.nullcontext():
        run = harness.start(layout, **MOE, num_layers=2, **options)
    run.losses(2)
    names = {id(param): name for name, param in run.chunks[0].named_parameters()}
    held = [names[id(each.param)] for each in param_states(run.optimizer)]
    return run.gradient_norms, [name for name in held if "local_experts" in name]


def mark_experts_undivided(name: str, param: torch.nn.Parameter) -> None:
    """As TransformerEngine's experts are, which take no part in tensor parallelism that Megatron-Core does for them."""
    if "local_experts" in name:
        param.tensor_model_parallel = False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "param_layout,undivided",
    [(True, False), pytest.param(True, True, marks=pytest.mark.slow), (False, True)],
    ids=["buckets", "buckets_te", "older_te"],
)
def test_gradient_norm_of_layer_wise_dp_cp_1_with_expert_dp_2(
    pool: RankPool, param_layout: bool, undivided: bool
) -> None:
    """It was too large by sqrt(2), or left out what the second tensor-parallel rank owns."""
    plain = pool.run(norms_and_owners, 2, ONE_COPY, undivided)
    ours = pool.run(norms_and_owners, 2, ONE_COPY_LAYER_WISE, undivided, param_layout=param_layout)
    assert [norms for norms, _ in ours] == [pytest.approx(norms, rel=1e-5) for norms, _ in plain]
    owned = [name for _, names in ours for name in names]
    assert sorted(owned) == sorted(plain[0][1]), "each expert weight has one owner"
    assert all(names for _, names in ours), "both ranks have some"


# --- torch's Adam ----------------------------------------------------------------------------------------------------


def save_and_go_on(layout: Layout, options: dict[str, Any], folder: str, metadata: dict[str, Any]) -> list[float]:
    run = harness.start(layout, **options)
    run.losses(2)
    harness.save_run(run, folder, metadata)
    return run.losses(3)


def load_and_go_on(
    layout: Layout, options: dict[str, Any], folder: str, metadata: dict[str, Any]
) -> tuple[list[float], set[int]]:
    """Losses, and the counts of updates that were loaded."""
    run = harness.start(layout, **options)
    harness.load_run(run, folder, metadata)
    steps = updates(run.optimizer)
    harness.save_run(run, f"{folder}-again", metadata)
    return run.losses(3), steps


def updates(optimizer: Any) -> set[int]:
    """What the state of the weights on this rank, or their param groups, say."""
    from megatron_muon.plugin.optimizer_state import param_states

    own = [each for each in param_states(optimizer) if each.key is not None]
    return {int(each.inner.state[each.key].get("step", each.group.get("step", -1))) for each in own}


def test_fully_reshardable_without_te_adam(pool: RankPool, tmp_path: Path) -> None:
    """KeyError 'step'."""
    folder, layout, options = str(tmp_path / "a"), Layout(layer_wise=True), {"bf16": True}
    wanted = pool.run(save_and_go_on, 2, layout, options, folder, FULLY)
    for losses, (got, steps) in zip(wanted, pool.run(load_and_go_on, 2, layout, options, folder, FULLY), strict=True):
        assert got == losses and steps == {2}
    assert differences(folder, f"{folder}-again") == []


def freeze_vectors(name: str, param: torch.nn.Parameter) -> None:
    param.requires_grad_(param.dim() > 1)


def with_one_weight_under_adam(
    layout: Layout, options: dict[str, Any], folder: str, load: bool
) -> tuple[list[float], set[str], set[int]]:
    """Save or load, and train on: losses, this rank's rules, and its counts of updates."""
    from megatron_muon.plugin.optimizer_state import param_states

    with models(freeze_vectors):
        run = harness.start(layout, bf16=True, tied=True, num_layers=3, **options)
    if load:
        harness.load_run(run, folder)
    else:
        run.losses(2)
        harness.save_run(run, folder)
    steps = updates(run.optimizer)
    return run.losses(3), {each.rule for each in param_states(run.optimizer)}, steps


def test_layer_wise_where_rank_0_owns_no_adam_weight(pool: RankPool, tmp_path: Path) -> None:
    """The count of Adam's updates, which rank 0 writes, was lost."""
    folder, older = str(tmp_path / "a"), {"param_layout": False}
    wanted, other = pool.run(with_one_weight_under_adam, 2, Layout(layer_wise=True), older, folder, False)
    assert (wanted[1], other[1]) == ({"muon"}, {"muon", "adam"})
    assert pool.run(with_one_weight_under_adam, 2, Layout(layer_wise=True), older, folder, True) == [wanted, other]
    for losses, _, steps in pool.run(with_one_weight_under_adam, 2, Layout(), {}, folder, True):
        assert losses == pytest.approx(wanted[0], abs=BFLOAT16) and steps == {2}


# --- float32 weights in a bfloat16 model -----------------------------------------------------------------------------

ROUTER_IN_FP32: dict[str, Any] = {**MOE, "bf16": True, "moe_router_dtype": "fp32"}


def keep_router(name: str, param: torch.nn.Parameter) -> None:
    if name.endswith("router.weight"):
        param.data = param.data.float()


def with_router_in_fp32(function: Callable[..., Any], layout: Layout, folder: str) -> Any:
    with models(keep_router):
        return function(layout, ROUTER_IN_FP32, folder, harness.CHECKPOINT_METADATA)


@pytest.mark.parametrize(
    "source,to",
    [
        pytest.param(Layout(), Layout(ep=2), id="plain_to_ep2", marks=pytest.mark.slow),
        pytest.param(Layout(ep=2), Layout(layer_wise=True), id="ep2_to_layer_wise"),
    ],
)
def test_native_fp32_parameters(pool: RankPool, tmp_path: Path, source: Layout, to: Layout) -> None:
    """They were not counted, and the state of all weights after them went to the wrong ones."""
    folder = str(tmp_path / "a")
    wanted = pool.run(with_router_in_fp32, 2, save_and_go_on, source, folder)[0]
    kept = contents(folder)
    assert kept["decoder.layers.mlp.router.weight"].dtype == torch.float32
    assert "optimizer.state.momentum_buffer.decoder.layers.mlp.router.weight" in kept
    assert "optimizer.state.fp32_param.decoder.layers.mlp.router.weight" not in kept, "it is its own master weight"
    got, _ = pool.run(with_router_in_fp32, 2, load_and_go_on, to, folder)[0]
    assert differences(folder, f"{folder}-again") == []
    assert got == pytest.approx(wanted, abs=BFLOAT16)


# --- values of flags -------------------------------------------------------------------------------------------------


def rates(layout: Layout, options: dict[str, Any], folder: str) -> tuple[list[tuple[float, float]], str]:
    """Learning rates and momenta of all groups after loading, and what was printed."""
    run = harness.start(layout, bf16=True, **options)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        harness.load_run(run, folder)
    found = [(group["max_lr"], group.get("momentum", 0.0)) for group in run.optimizer.param_groups]
    return found, output.getvalue()


def test_changed_learning_rate_at_resume(pool: RankPool, tmp_path: Path) -> None:
    """Megatron-Core fails on a changed learning rate, and ignores a changed momentum: flags win."""
    folder = str(tmp_path / "a")
    pool.run(save_and_go_on, 2, Layout(tp=2), {"bf16": True}, folder, FULLY)
    changed = {"optimizer": {"lr": 0.02, "min_lr": 0.001, "muon_momentum": 0.9}}
    (found, output), (_, silent) = pool.run(rates, 2, Layout(tp=2), changed, folder)
    assert set(found) == {(0.02, 0.9), (0.02, 0.0)}, "Muon's groups and Adam's"
    assert "megatron_muon" not in silent, "one rank speaks"
    assert "changed by flags: muon momentum: 0.95 in the checkpoint, 0.9 now" in output
    assert "changed by flags: adam max_lr: 0.01 in the checkpoint, 0.02 now" in output


# --- --ckpt-format torch ---------------------------------------------------------------------------------------------


def file_of_each_rank(folder: str) -> tuple[list[float], list[float]]:
    """Give each rank's momenta a number of its own, save, wipe, load: the sums before and after."""
    from megatron_muon.plugin.optimizer_state import param_states

    # As megatron.training names it: by the rank among replicas of the data, which ranks of one context share.
    path = str(Path(folder) / "layer_wise_optimizer_0.pt")
    run = harness.start(Layout(cp=2, layer_wise=True), param_layout=False)
    momenta = [
        each.tensors["momentum_buffer"] for each in param_states(run.optimizer, create=True) if each.rule == "muon"
    ]
    for number, tensor in enumerate(momenta):
        tensor.fill_(1.0 + number + 100 * dist.get_rank())
    before = [tensor.sum().item() for tensor in momenta]
    run.optimizer.save_state_dict_to_file(path)
    dist.barrier()
    for tensor in momenta:
        tensor.zero_()
    run.optimizer.load_state_dict_from_file(path)
    after = [each.tensors["momentum_buffer"] for each in param_states(run.optimizer) if each.rule == "muon"]
    return before, [tensor.sum().item() for tensor in after]


def test_ckpt_format_torch_with_context_parallelism(pool: RankPool, tmp_path: Path) -> None:
    """All ranks of a context wrote one file."""
    results = pool.run(file_of_each_rank, 2, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"layer_wise_optimizer_{rank}.pt" for rank in (0, 1)]
    for before, after in results:
        assert after == before and all(map(math.isfinite, after))
    assert results[0][0] != results[1][0]
