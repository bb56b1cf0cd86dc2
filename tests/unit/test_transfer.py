"""The arithmetic of hyperparameter transfer: eps, weight decay, explicit spectral norms, sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_muon import Muon, MuonConfig
from megatron_muon.errors import ConfigError
from megatron_muon.orthogonalize import iteration
from megatron_muon.routing.layout import TABLE as TABLE_KIND
from megatron_muon.routing.layout import MatrixLayout
from megatron_muon.transfer import MATRIX, READOUT, SELECTOR, TABLE, VECTOR, Role, Transfer, roles, scale_initialization
from tests.reference import orthogonalized

RULE = {"scale_mode": "unit_rms_norm", "weight_decay_method": "independent_scheduled"}
EXACT = {"fp32_matmul_prec": "highest", "weight_decay": 0.0, "momentum": 0.0}


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_step(gradient: torch.Tensor, depth: float, **options: Any) -> torch.Tensor:
    """The update of a weight of zeros in a group of this depth."""
    param = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = Muon([{"params": [param], "damping_depth": depth}], lr=1.0, damping_depth=1.0, **EXACT, **options)
    param.grad = gradient
    optimizer.step()
    return -param.detach()


@pytest.mark.parametrize("eps", [1e-7, 0.3])
def test_gradients_and_eps_that_shrink_with_depth_give_the_same_update(eps: float) -> None:
    """Exactly: the damping of a deeper model is that of the base."""
    gradient = matrix(12, 8)
    base = one_step(gradient, 1.0, scale_mode="unit_rms_norm", eps=eps)
    for depth in (2.0, 8.0):
        assert torch.equal(one_step(gradient / depth, depth, scale_mode="unit_rms_norm", eps=eps), base)


@pytest.mark.parametrize(("m", "n"), [(12, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("depth", [1.0, 3.0])
def test_eps_is_added_with_its_factors(m: int, n: int, depth: float) -> None:
    """eps sqrt(n / m) / L, with an eps that matters."""
    gradient, eps = matrix(m, n), 2000.0
    damped = gradient / (gradient.norm() + eps * (n / m) ** 0.5 / depth)
    # The reference divides by the norm; to start it from a smaller matrix, its steps are written out.
    x = damped if m <= n else damped.mT
    for a, b, c in iteration("quintic", 5).coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    expected = (x if m <= n else x.mT) * (m / n) ** 0.5
    found = one_step(gradient, depth, scale_mode="unit_rms_norm", eps=eps)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    undamped = orthogonalized(gradient, iteration("quintic", 5).coefficients) * (m / n) ** 0.5
    assert (found - undamped).norm() > 0.05 * undamped.norm()


@pytest.mark.parametrize("method", ["independent_scheduled", "decoupled"])
def test_static_decay_does_not_depend_on_the_rate(method: str) -> None:
    """Ten times the learning rate: what decay alone does to a weight is the same, bit for bit."""

    def decayed(peak: float) -> torch.Tensor:
        param = torch.nn.Parameter(matrix(6, 4))
        optimizer = Muon([{"params": [param], "max_lr": peak}], lr=peak, weight_decay=0.1, weight_decay_method=method)
        for share in (0.25, 0.5, 1.0, 0.5):
            optimizer.param_groups[0]["lr"] = peak * share
            param.grad = torch.zeros_like(param)
            optimizer.step()
        return param.detach()

    assert torch.equal(decayed(0.01), decayed(0.1)) == (method == "independent_scheduled")


def test_factors() -> None:
    """Table 2 of arXiv 2512.05620 for 4 times the width and 2 times the depth; what ends a branch is 1 / L itself."""
    transfer = Transfer(width=4.0, depth=2.0)
    rows = {
        Role(TABLE): (1.0, 1 / 4, 1.0),
        Role(READOUT): (1 / 4, 1.0, 1.0),
        Role(MATRIX, in_layer=True): (1 / 4, 1 / 8, 2.0),
        Role(VECTOR, in_layer=True): (1.0, 1 / 8, 2.0),
        Role(VECTOR): (1.0, 1 / 4, 1.0),
        Role(MATRIX, in_layer=True, ends_branch=True): (1 / 8, 1 / 4, 1.0),
        Role(VECTOR, in_layer=True, ends_branch=True): (1 / 2, 1 / 4, 1.0),
        Role(SELECTOR, in_layer=True): (1 / 4, 1 / 2, 2.0),
    }
    for role, expected in rows.items():
        assert (transfer.rate(role), transfer.eps(role), transfer.damping_depth(role)) == expected, role


def test_a_gate_is_a_selector() -> None:
    """One output at every size, which sums over its inputs; a column has one input."""
    module = torch.nn.ModuleDict({"gate": torch.nn.Linear(8, 1), "column": torch.nn.Linear(1, 8, bias=False)})
    found = {name: role.kind for (name, _), role in zip(module.named_parameters(), roles_of(module), strict=True)}
    assert found == {"gate.weight": SELECTOR, "gate.bias": VECTOR, "column.weight": VECTOR}


class Router(torch.nn.Module):
    """As Megatron's: (experts, hidden)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 8))


class TopKRouter(Router):
    pass


def test_a_router_is_a_selector() -> None:
    """As many experts at every width."""
    assert [role.kind for role in roles_of(TopKRouter())] == [SELECTOR]
    assert [role.kind for role in roles_of(torch.nn.Linear(8, 4, bias=False))] == [MATRIX]


def test_columns_of_matrices_do_not_transfer() -> None:
    """Of a table they are fine: its inputs are looked up, not summed."""
    linear = torch.nn.Linear(8, 4, bias=False)
    linear.weight.matrix_layout = MatrixLayout("linear", direction="col_norm")
    with pytest.raises(ConfigError, match="--muon-transfer with --muon-param-rule 'weight=col_norm'"):
        roles_of(linear)
    linear.weight.matrix_layout = MatrixLayout(TABLE_KIND, direction="col_norm")
    roles_of(linear)


def roles_of(module: torch.nn.Module) -> list[Role]:
    return list(roles(module, module.named_parameters()).values())


def test_parts_of_other_sizes_are_refused() -> None:
    """A vision tower has a base of its own."""
    module = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    for part, size in zip(module, (256, 512), strict=True):
        part.config = SimpleNamespace(hidden_size=size)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"parts of different hidden sizes \(256, 512\)"):
        roles_of(module)


def model_config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"hidden_size": 512, "num_layers": 12, "init_method_std": 0.02, **changes})


def test_sizes_come_from_the_whole_models_config() -> None:
    assert Transfer.of("128x3", model_config()) == Transfer(4.0, 4.0)
    for name, value in (("num_layers", 0), ("num_layers", None), ("hidden_size", None)):
        with pytest.raises(ConfigError, match=f"--muon-transfer 128x3: the model's config says {name} {value}"):
            Transfer.of("128x3", model_config(**{name: value}))


def test_initial_weights() -> None:
    config = model_config()
    scale_initialization(config, "128x3")
    assert config.init_method.std == pytest.approx(0.02 / 2)
    assert torch.equal(config.output_layer_init_method(torch.ones(3, 2)), torch.zeros(3, 2))
    assert config.muon_transfer == "128x3"
    with pytest.raises(ConfigError, match="--muon-transfer 128x3 with --use-mup"):
        scale_initialization(model_config(use_mup=True), "128x3")
    with pytest.raises(ConfigError, match=r"with --moe-latent-size 64: .* would both start from zeros"):
        scale_initialization(model_config(moe_latent_size=64), "128x3")


@pytest.mark.parametrize("base", ["128", "x", "128x", "0x4", "128x-2", "axb", 5])
def test_wrong_bases(base: Any) -> None:
    with pytest.raises(ConfigError, match=f"--muon-transfer {base}: give WIDTHxDEPTH"):
        MuonConfig(transfer=base, **RULE).validate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_mode": "moonlight"}, "--muon-transfer 128x3 with --muon-scale-mode moonlight"),
        ({"weight_decay_method": "decoupled"}, "--muon-transfer 128x3 with --muon-weight-decay-method decoupled"),
        ({"variant": "polargrad"}, "--muon-transfer 128x3 with --muon-variant polargrad"),
    ],
)
def test_what_does_not_transfer(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MuonConfig(transfer="128x3", **{**RULE, **options}).validate()
    MuonConfig(transfer="128x3", **RULE).validate()


@pytest.mark.parametrize("dim", [(4, 6), (6, 4)])
def test_explicit_spectral_norm_of_rows_that_sum_to_zero(dim: tuple[int, int]) -> None:
    param = torch.nn.Parameter(torch.zeros(dim, dtype=torch.float64))
    optimizer = Muon([param], lr=1.0, scale_mode="spectral_norm", **EXACT)
    param.grad = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(dim[0] // 2, dim[1] // 2)
    optimizer.step()
    found = torch.linalg.matrix_norm(param.detach(), 2).item()
    assert found == pytest.approx((dim[0] / dim[1]) ** 0.5, rel=1e-6)


def test_hidden_size_of_moonlights_baseline() -> None:
    with pytest.raises(ConfigError, match="scale_mode moonlight_hidden with hidden_size 0"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], scale_mode="moonlight_hidden")
    gradient = matrix(6, 4)
    updates = {}
    for mode, options in (("none", {}), ("moonlight_hidden", {"hidden_size": 25})):
        param = torch.nn.Parameter(torch.zeros_like(gradient))
        optimizer = Muon([param], lr=1.0, scale_mode=mode, **options, **EXACT)
        param.grad = gradient
        optimizer.step()
        updates[mode] = param.detach()
    torch.testing.assert_close(updates["moonlight_hidden"], updates["none"] * 0.2 * 5.0, rtol=1e-12, atol=0)
