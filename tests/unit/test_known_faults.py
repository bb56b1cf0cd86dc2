"""Faults of other implementations of Muon, and the test that fails if this package has them.

Megatron-Core's QK-clip (covered by ``tests/megatron/test_qk_clip.py`` and ``tests/unit/test_qk_clip.py``):

* layers of multi-token prediction are left out, hybrid layers without attention crash:
  ``test_layers_of_every_stack_are_visited``;
* thresholds above or maxima below 0 give negative factors, and NaN: ``test_factor_is_exactly_one_unless_above...``;
* global sizes beside local groups, more ranks than query groups: ``test_tensor_parallel_shards_are_clipped...``,
  ``test_reassembled_weights_are_those_of_one_rank``;
* output gate and biases ignored: ``test_logits_come_down_to_the_threshold`` (gate, bias);
* flat main parameters: ``test_flat_slices_are_clipped_as_whole_weights``;
* the bfloat16 weight is scaled apart from its master: ``test_float32_masters_are_scaled_before_they_are_copied``;
* steps that were skipped are clipped: ``test_skipped_steps_clip_nothing_and_forget_the_maxima``;
* one all-reduce a layer: ``test_one_collective_and_no_wait_a_step``.

Megatron-Core's Muon, with emerging-optimizers:

* the flag's momentum is 0.9, the config's 0.95: ``test_one_default_of_the_momentum`` below;
* padding of weight rematerialisation goes into the norm: ``test_rematerialised_weights_are_refused`` below;
* the scale is applied twice, and from the shard of a fused weight, by NorMuon, AdaMuon and NAMO:
  ``test_scale_is_applied_once``, ``test_scale_of_each_block`` below; shapes of shards in ``test_golden_numbers.py``;
* norms of the local shard: ``tests/distributed/test_adaptive.py::test_shards_get_the_update_of_the_whole``;
* towers are split by the language model's config: ``tests/megatron/test_layout_rules.py::test_rows_of_a_weight``;
* position embeddings and 1 x h gates are orthogonalized:
  ``tests/megatron/test_layout_rules.py::test_weights_of_the_scalar_optimizer``;
* a split that fails is skipped without a word:
  ``tests/megatron/test_routing.py::test_fused_weight_of_unexpected_shape_is_an_error``;
* an overflow that is found late changes the momentum: ``test_overflow_leaves_all_state_as_it_was`` below.

Emerging-optimizers:

* NorMuon averages over the shorter side: ``test_golden_numbers.py::test_normuon_gives_rows_equal_norms`` (wide);
* ``independent`` weight decay does not follow the schedule: there is ``independent_scheduled``,
  ``tests/distributed/test_sizes.py::test_weight_decay`` and ``test_scheduled_decay_has_the_same_effect...`` below;
* Hyperball has one radius for all: ``test_every_matrix_has_a_radius_of_its_own`` below.

The spectral sphere's fork of Megatron-LM:

* the retraction of a fused weight goes into a copy: ``test_retraction_reaches_fused_weights`` below;
* radius and scale of the local shard: ``tests/distributed/test_sphere.py::test_shards_get_the_update_of_the_whole``;
* a wait for the device in each evaluation: ``test_measured_rules`` (tests/fake_cuda).

Advanced optimizers (a version that lost an argument, the layers' number and the decay's schedule):
``tests/megatron/test_factory.py::test_every_knob_reaches_the_optimizer_from_code``.

Other scripts:

* "the scale sqrt(max / min) keeps the operator norm of updates": ``test_aspect_ratio_is_the_operator_norm`` below;
* the kernel's width is taken for the inputs of a convolution: ``test_convolutions_are_not_matrices`` below;
* tall matrices are turned the wrong way: ``test_orthogonalizer.py::test_tall_and_wide_through_the_optimizer``;
* weights are routed by parts of their names (``embed`` misses ``lm_head``; ``q_proj and k_proj`` is never true):
  ``test_names_decide_nothing`` below;
* the momentum of bfloat16 weights is bfloat16: ``test_momentum_of_bfloat16_models_is_float32`` below;
* the gradient's buffer is overwritten: ``test_muon.py::test_step_follows_the_formula``.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, Muon, MuonConfig, param_groups
from megatron_muon.optimizers.registry import VARIANTS
from megatron_muon.optimizers.sphere import SpectralSphere
from megatron_muon.orthogonalize.scale import scale_factor
from megatron_muon.routing import _is_nonlinear_or_embedding
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tools.splitting import split

POLAR = {"coefficient_type": "polar_express", "num_ns_steps": 16, "fp32_matmul_prec": "highest", "eps": 1e-30}
QKV = MatrixLayout("qkv", (Section("q", 8), Section("k", 4), Section("v", 4)))


def weight(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def update(gradient: torch.Tensor, make: Any = Muon, layout: MatrixLayout = WHOLE, **options: Any) -> torch.Tensor:
    """The first update, at learning rate 1, without momentum."""
    param = torch.nn.Parameter(torch.zeros_like(gradient))
    param.matrix_layout = layout
    optimizer = make([param], lr=1.0, momentum=0.0, weight_decay=0.0, **{**POLAR, **options})
    param.grad = gradient
    optimizer.step()
    return -param.detach()


# --- Megatron-Core's Muon ---


def test_one_default_of_the_momentum() -> None:
    assert MuonConfig().momentum == inspect.signature(Muon).parameters["momentum"].default == 0.95


def test_rematerialised_weights_are_refused() -> None:
    from megatron_muon.plugin.factory import _check_groups

    two = types.SimpleNamespace(size=lambda: 2)
    with pytest.raises(ConfigError, match=r"rematerialisation over 2 ranks \(gtp_remat\)"):
        _check_groups(types.SimpleNamespace(gtp_remat=two))
    _check_groups(types.SimpleNamespace(gtp_remat=types.SimpleNamespace(size=lambda: 1)))


# Second moments of the first step alone leave these methods the size of an orthogonal matrix.
ONE_STEP = {"beta2": 0.0, "eps": 1e-30}


@pytest.mark.parametrize("method", ["adamuon", "normuon", "namo"])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_scale_is_applied_once(method: str, shape: tuple[int, int]) -> None:
    """An RMS of 1, not of sqrt(12)."""
    found = update(weight(*shape), Muon, variant=VARIANTS[method](**ONE_STEP), scale_mode="spectral")
    assert found.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("method", ["adamuon", "normuon", "namo"])
def test_scale_of_each_block(method: str) -> None:
    """Of q, k and v (16, 8, 8 rows), not of the 32 rows of the fused weight."""
    options = {"variant": VARIANTS[method](**ONE_STEP), "scale_mode": "unit_rms_norm"}
    for part in split(QKV, update(weight(32, 8), Muon, QKV, **options)):
        m, n = part.shape
        assert part.norm().item() == pytest.approx(scale_factor("unit_rms_norm", m, n) * min(m, n) ** 0.5, rel=1e-9)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {},
    "normuon": {"name": "adaptive_muon", "adaptive_muon_moment2_method": "normuon"},
    "spectral_sphere": {"name": "spectral_sphere"},
}


def snapshot(run: Any) -> list[Any]:
    """Weights, main weights, groups' steps, and all state of all optimizers."""
    found: list[Any] = [param.detach().clone() for chunk in run.chunks for param in chunk.parameters()]
    for part in run.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            found.append(torch.tensor(group.get("step", 0)))
            for param in group["params"]:
                found.append(param.detach().clone())
                state = part.optimizer.state[param]
                found += [torch.as_tensor(state[name]).clone() for name in sorted(state)]
    return found


def overflow(optimizer: dict[str, Any]) -> tuple[bool, int, list[int], bool]:
    """A step with an infinite gradient: success, tensors, those that changed, and whether the next step works."""
    scaler = {"loss_scale": 1.0}  # makes Megatron look for overflows in bfloat16 too
    run = harness.start(Layout(), bf16=True, optimizer={**optimizer, **scaler})
    run.losses(2)
    before = snapshot(run)
    for param in run.chunks[0].parameters():
        param.main_grad.fill_(1.0)
    next(run.chunks[0].parameters()).main_grad.view(-1)[3] = float("inf")
    success, _, _ = run.optimizer.step()
    after = snapshot(run)
    changed = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if not torch.equal(old, new)]
    run.losses(1)
    return bool(success), len(before), changed, not torch.equal(before[0], snapshot(run)[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overflow_leaves_all_state_as_it_was(pool: RankPool, name: str) -> None:
    """In any bit: momentum, second moments, singular vectors, multipliers, radii, step counts."""
    success, count, changed, goes_on = pool.run(overflow, 1, OPTIMIZERS[name])[0]
    assert not success and count > 60 and changed == [] and goes_on


# --- emerging-optimizers ---


def test_scheduled_decay_has_the_same_effect_at_every_learning_rate() -> None:
    """At half of the peak rate half of the decay; ``independent`` shrinks weights by all of it in every step."""
    kept = {}
    for method in ("independent", "independent_scheduled"):
        param = torch.nn.Parameter(weight(6, 4))
        optimizer = Muon([param], lr=0.1, weight_decay=0.2, weight_decay_method=method)
        optimizer.param_groups[0]["lr"] = 0.05
        param.grad = torch.zeros_like(param)
        optimizer.step()
        kept[method] = (param.detach() / weight(6, 4)).mean().item()
    assert kept == pytest.approx({"independent": 0.8, "independent_scheduled": 0.9}, rel=1e-12)


def test_every_matrix_has_a_radius_of_its_own() -> None:
    """Two weights of norms 1 and 7, and heads of a third."""
    params = [torch.nn.Parameter(size * weight(6, 4) / weight(6, 4).norm()) for size in (1.0, 7.0)]
    fused = torch.nn.Parameter(weight(16, 6) * torch.linspace(1, 4, 16, dtype=torch.float64)[:, None])
    fused.matrix_layout = QKV
    optimizer = Muon([*params, fused], lr=0.1, variant="hyperball", scale_mode="none", fp32_matmul_prec="highest")
    before = [part.norm().item() for part in (*params, *split(QKV, fused.detach()))]
    for step in range(5):
        for param in (*params, fused):
            param.grad = weight(*param.shape, seed=step)
        optimizer.step()
    after = [part.norm().item() for part in (*params, *split(QKV, fused.detach()))]
    assert after == pytest.approx(before, rel=1e-12) and before[:2] == pytest.approx([1.0, 7.0])


# --- the spectral sphere's fork ---


def test_retraction_reaches_fused_weights() -> None:
    """A step without a gradient: every head's rows are brought to 2 sqrt(m / n), in the weight itself."""
    heads = MatrixLayout("qkv", tuple(Section(part.name, part.rows, matrix_rows=4) for part in QKV.sections))
    param = torch.nn.Parameter(weight(32, 6))
    param.matrix_layout = heads
    optimizer = Muon([param], variant=SpectralSphere(radius=2.0), lr=0.1, **POLAR)
    for _ in range(20):  # each step goes on with the power iteration
        param.grad = torch.zeros_like(param)
        optimizer.step()
    for rows in param.detach().view(8, 4, 6):
        assert torch.linalg.matrix_norm(rows, 2).item() == pytest.approx(2.0 * (4 / 6) ** 0.5, rel=1e-6)


# --- other scripts ---


def test_aspect_ratio_is_the_operator_norm() -> None:
    """sqrt(q / p) times the learning rate: it does depend on the shape, whichever side is longer."""
    for shape, expected in (((16, 16), 1.0), ((64, 16), 2.0), ((16, 64), 2.0), ((16, 144), 3.0)):
        found = update(weight(*shape), scale_mode="aspect_ratio")
        assert torch.linalg.matrix_norm(found, 2).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("layer", [torch.nn.Conv1d(8, 6, 3), torch.nn.Conv2d(8, 6, 3), torch.nn.Conv3d(8, 6, 3)])
def test_convolutions_are_not_matrices(layer: torch.nn.Module) -> None:
    assert _is_nonlinear_or_embedding(layer.weight)
    assert param_groups(torch.nn.Sequential(layer)).muon == []
    with pytest.raises(ValueError, match="2-D weights"):
        Muon([layer.weight])


class Misnamed(torch.nn.Module):
    """Names that mean something else than what the modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = torch.nn.Embedding(16, 8)
        self.embed_norm_proj = torch.nn.Linear(8, 12, bias=False)
        self.q_proj_k_proj = torch.nn.Linear(12, 8, bias=False)
        self.unembed = torch.nn.Linear(8, 16, bias=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.unembed


def test_names_decide_nothing() -> None:
    groups = param_groups(Misnamed())
    assert groups.muon[0]["param_names"] == ["embed_norm_proj.weight", "q_proj_k_proj.weight"]
    assert groups.scalar[0]["param_names"] == ["mixer.weight", "unembed.weight"]


def momentum_types(layer_wise: bool, optimizer: dict[str, Any]) -> set[tuple[torch.dtype, torch.dtype]]:
    """(dtype of the model's weights, of their optimizer's tensors), of Muon's weights."""
    run = harness.start(Layout(layer_wise=layer_wise), bf16=True, optimizer=optimizer)
    run.losses(1)
    weights = {param.dtype for param in run.chunks[0].parameters() if not _is_nonlinear_or_embedding(param)}
    inner = [part.optimizer for part in run.optimizer.chained_optimizers]
    states = [state for part in inner if isinstance(part, Muon) for state in part.state.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return {(dtype, tensor.dtype) for dtype in weights for tensor in tensors}


@pytest.mark.parametrize(("name", "layer_wise"), [("muon", False), ("muon", True), ("spectral_sphere", False)])
def test_momentum_of_bfloat16_models_is_float32(pool: RankPool, name: str, layer_wise: bool) -> None:
    """Megatron keeps float32 copies of the weights, and Muon's state is theirs."""
    found = pool.run(momentum_types, 1, layer_wise, OPTIMIZERS[name])[0]
    assert found == {(torch.bfloat16, torch.float32)}
