"""LoRA under Muon: who updates the factors, at which size, and which adapters are refused or warned of."""

from __future__ import annotations

import math
import types
import warnings
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, Muon, MuonConfig, param_groups
from megatron_muon.orthogonalize.scale import scale_factor
from megatron_muon.plugin.variants import check_adapters
from megatron_muon.routing import _is_nonlinear_or_embedding, annotate, global_names
from megatron_muon.routing.predicate import exclusion_reason
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.unit.small_modules import ParallelLora, Wrapper, megatron_class, options, self_attention
from tools.splitting import split

# All singular values 1 within 5e-4.
EXACT = {"coefficient_type": "deepseekv4", "num_ns_steps": 10, "fp32_matmul_prec": "highest"}


class BridgeAdapter(torch.nn.Module):
    """What Megatron-Bridge's ParallelLinearAdapter tells of itself."""

    def __init__(self, rows: int = 64, rank: int = 4, alpha: float | None = None, columns: int = 32) -> None:
        super().__init__()
        self.dim = rank
        self.alpha = rank if alpha is None else alpha
        self.linear_in = torch.nn.Linear(columns, rank, bias=False)
        self.linear_out = torch.nn.Linear(rank, rows, bias=False)


class BridgeDoRAAdapter(BridgeAdapter):
    """Its ParallelLinearDoRAAdapter."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.weight_magnitude = torch.nn.Parameter(torch.ones(64))

    def get_weight_magnitude(self) -> torch.Tensor:
        return self.weight_magnitude


class PeftLayer(torch.nn.Module):
    """What peft's LoraLayer tells of itself: everything in dictionaries by the name of the adapter."""

    def __init__(self, alpha: float = 4, rank: int = 4, scaling: float | None = None) -> None:
        super().__init__()
        self.base_layer = base()
        self.r, self.lora_alpha = {"default": rank}, {"default": alpha}
        self.scaling = {"default": alpha / rank if scaling is None else scaling}
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(32, rank, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(rank, 64, bias=False)})
        self.lora_magnitude_vector = torch.nn.ModuleDict()


class TorchtuneLayer(torch.nn.Module):
    """What torchtune's LoRALinear and DoRALinear tell of themselves."""

    def __init__(self, dora: bool = False, alpha: float = 4) -> None:
        super().__init__()
        self.rank, self.alpha, self.scaling = 4, alpha, alpha / 4
        self.weight = torch.nn.Parameter(torch.zeros(64, 32), requires_grad=False)
        self.lora_a = torch.nn.Linear(32, 4, bias=False)
        self.lora_b = torch.nn.Linear(4, 64, bias=False)
        if dora:
            self.magnitude = torch.nn.Parameter(torch.ones(64))


def base() -> torch.nn.Module:
    return torch.nn.Linear(32, 64, bias=False).requires_grad_(False)


def bridge(adapter: torch.nn.Module) -> Wrapper:
    return Wrapper(to_wrap=base(), adapter=adapter)


def dora_of_peft() -> PeftLayer:
    layer = PeftLayer()
    magnitude = torch.nn.Module()
    magnitude.weight = torch.nn.Parameter(torch.ones(64))
    layer.lora_magnitude_vector["default"] = magnitude
    return layer


def magnitude_on_the_wrapper() -> Wrapper:
    wrapper = bridge(BridgeAdapter())
    wrapper.weight_magnitude = torch.nn.Parameter(torch.ones(64))
    return wrapper


def model(layer: torch.nn.Module) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"attention": self_attention(layer)})


def factors(module: torch.nn.Module) -> dict[str, Any]:
    """A and B."""
    return {
        param.lora_factor: param  # type: ignore[attr-defined]
        for param in module.parameters()
        if hasattr(param, "lora_factor")
    }


class TestWhoUpdatesA:
    @pytest.mark.parametrize("build", [lambda: bridge(BridgeAdapter()), PeftLayer, TorchtuneLayer])
    def test_adam(self, build: Any) -> None:
        layer = build()
        annotate(model(layer), options(lora_a="adam"))
        found = factors(layer)
        assert exclusion_reason(found["A"]) == "LoRA A, rank x inputs (--muon-lora-a adam)"
        assert exclusion_reason(found["B"]) is None
        annotate(model(layer))
        assert not any(map(_is_nonlinear_or_embedding, found.values())), "the default is Muon for both"

    def test_b_keeps_its_split(self) -> None:
        layer = bridge(BridgeAdapter())
        annotate(model(layer), options(lora_a="adam"))
        assert [section.name for section in factors(layer)["B"].matrix_layout.sections] == ["q", "k", "v"]

    def test_a_rule_about_the_weight_outweighs_it(self) -> None:
        layer = bridge(BridgeAdapter())
        annotate(model(layer), options("*.linear_in.weight=muon", "*.linear_out.weight=adam", lora_a="adam"))
        found = factors(layer)
        assert not _is_nonlinear_or_embedding(found["A"]) and _is_nonlinear_or_embedding(found["B"])

    def test_report_and_groups(self) -> None:
        groups = param_groups(model(bridge(BridgeAdapter())), MuonConfig(lora_a="adam"))
        assert groups.scalar[0]["param_names"] == ["attention.linear_qkv.adapter.linear_in.weight"]
        assert "attention.linear_qkv.adapter.linear_out.weight" in groups.muon[0]["param_names"]
        assert "LoRA A, rank x inputs (lora_a adam)" in groups.table


@pytest.mark.parametrize("ranks", [1, 2])
def test_b_of_a_layer_that_ranks_hold_whole_is_divided_and_follows_it_too(ranks: int) -> None:
    """Megatron-Bridge divides B's rows even of a router: who updates it must not depend on the number of ranks."""
    router = megatron_class("Router", "transformer.moe.router")()
    router.weight = torch.nn.Parameter(torch.zeros(8, 32), requires_grad=False)
    adapter = BridgeAdapter(rows=8 // ranks)
    b: Any = adapter.linear_out.weight
    b.tensor_model_parallel, b.partition_dim = ranks > 1, 0
    wrapper = Wrapper(to_wrap=router, adapter=adapter)
    annotate(wrapper, options(router="adam"))
    assert exclusion_reason(b) == "--muon-router adam" and exclusion_reason(adapter.linear_in.weight) is None
    annotate(wrapper)
    assert exclusion_reason(b) is None and b.matrix_layout.kind == "whole"


DORA = {
    "bridge": (lambda: bridge(BridgeDoRAAdapter()), "linear_qkv.adapter", "weight_magnitude"),
    "wrapper": (magnitude_on_the_wrapper, "linear_qkv.adapter", "weight_magnitude"),
    "peft": (dora_of_peft, "linear_qkv", "lora_magnitude_vector"),
    "torchtune": (lambda: TorchtuneLayer(dora=True), "linear_qkv", "magnitude"),
}


class TestDoRA:
    @pytest.mark.parametrize("kind", DORA)
    def test_is_refused(self, kind: str) -> None:
        build, name, magnitude = DORA[kind]
        with pytest.raises(ConfigError) as error:
            annotate(model(build()))
        message = str(error.value)
        assert message.startswith(f"attention.{name}: DoRA (it has a {magnitude}) normalises the sum")
        assert "Train it without DoRA (as LoRA), or with Adam" in message
        assert f"--muon-param-rule 'attention.{name}.*=adam'" in message

    @pytest.mark.parametrize("kind", DORA)
    def test_goes_with_adam_by_the_rule_that_the_message_gives(self, kind: str) -> None:
        build, name, _ = DORA[kind]
        layer = build()
        annotate(model(layer), options(f"attention.{name}.*=adam"))
        assert all(map(_is_nonlinear_or_embedding, factors(layer).values()))

    def test_one_factor_is_not_enough(self) -> None:
        for rules in (options("*.linear_in.weight=adam"), options(lora_a="adam"), options("*.adapter.*.weight=muon")):
            with pytest.raises(ConfigError, match="DoRA"):
                annotate(model(bridge(BridgeDoRAAdapter())), rules)

    @pytest.mark.parametrize("tag", [{"skip_orthogonalization": True}, {"use_muon": False}])
    def test_goes_with_tags_set_by_hand(self, tag: dict[str, bool]) -> None:
        adapter = BridgeDoRAAdapter()
        for layer in (adapter.linear_in, adapter.linear_out):
            vars(layer.weight).update(tag)
        annotate(model(bridge(adapter)))

    def test_many_are_counted(self) -> None:
        layers = torch.nn.ModuleList([bridge(BridgeDoRAAdapter()) for _ in range(3)])
        with pytest.raises(ConfigError, match=r"^0\.adapter and 2 more: DoRA"):
            annotate(layers)

    def test_frozen_and_unused_ones_are_not_our_business(self) -> None:
        annotate(model(bridge(BridgeDoRAAdapter().requires_grad_(False))))
        layer = PeftLayer()
        magnitude = torch.nn.Module()
        magnitude.weight = torch.nn.Parameter(torch.ones(64))
        layer.lora_magnitude_vector["another"] = magnitude
        annotate(model(layer))

    def test_before_the_optimizer_is_known_nothing_is_refused(self) -> None:
        """DDP is built with any optimizer; the factory of Muon looks again."""
        annotate(model(bridge(BridgeDoRAAdapter())), adapters=False)


def told(layer: torch.nn.Module, rules: MuonConfig | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        annotate(model(layer), rules)
    return [str(warning.message) for warning in caught]


class TestMultiplier:
    @pytest.mark.parametrize(
        ("layer", "name", "numbers"),
        [
            (bridge(BridgeAdapter(alpha=32)), "attention.linear_qkv.adapter", "8 (alpha 32, rank 4)"),
            (PeftLayer(alpha=8), "attention.linear_qkv", "2 (alpha 8, rank 4)"),
            (PeftLayer(alpha=4, scaling=2.0), "attention.linear_qkv", "2 (alpha 4, rank 4)"),
            (TorchtuneLayer(alpha=2), "attention.linear_qkv", "0.5 (alpha 2, rank 4)"),
        ],
    )
    def test_other_than_1_is_told_once(self, layer: torch.nn.Module, name: str, numbers: str) -> None:
        (message,) = told(layer)
        assert message.startswith(f"{name}: this adapter's output is multiplied by {numbers}, and so is")
        assert "set alpha to the rank" in message

    @pytest.mark.parametrize(
        "layer",
        [
            bridge(BridgeAdapter()),
            PeftLayer(),
            PeftLayer(alpha=2, scaling=1.0),  # rank-stabilised: alpha / sqrt(rank)
            TorchtuneLayer(),
            Wrapper(linear_in=torch.nn.Linear(32, 4), linear_out=torch.nn.Linear(4, 64)),
        ],
    )
    def test_1_and_unknown_are_silent(self, layer: torch.nn.Module) -> None:
        assert told(layer) == []

    def test_what_adam_trains_is_silent(self) -> None:
        rules = options("*.adapter.*=adam")
        assert told(bridge(BridgeAdapter(alpha=32)), rules) == []
        assert len(told(bridge(BridgeAdapter(alpha=32)), options(lora_a="adam"))) == 1, "B is Muon's"

    def test_adapters_of_one_multiplier_are_told_together(self) -> None:
        layers = torch.nn.ModuleList(bridge(BridgeAdapter(alpha=alpha)) for alpha in (8, 8, 4, 16, 8))
        with pytest.warns(UserWarning, match="multiplied by") as caught:
            annotate(layers)
        assert [str(warning.message).split(":")[0] for warning in caught] == ["0.adapter and 2 more", "3.adapter"]


# --- the size of updates ---


def update_of_b(rank: int, scale_mode: str, rows: int = 512) -> torch.Tensor:
    """The first update of B, from zero, at learning rate 1."""
    b = torch.nn.Parameter(torch.zeros(rows, rank))
    b.grad = torch.randn(rows, rank, generator=torch.Generator().manual_seed(rank))
    Muon([b], lr=1.0, weight_decay=0.0, scale_mode=scale_mode, **EXACT).step()
    return b.detach()


def rms_of_outputs(matrix: torch.Tensor) -> float:
    return matrix.square().sum(dim=1).mean().sqrt().item()


@pytest.mark.parametrize(
    ("scale_mode", "expected"),
    [("unit_rms_norm", (0.576, 0.576, 0.576)), ("moonlight", (0.230, 0.459, 0.922))],
)
def test_outputs_change_alike_at_every_rank(scale_mode: str, expected: tuple[float, ...]) -> None:
    """RMS of dB A x with Kaiming-uniform A: 1 / sqrt(3) with sqrt(outputs / r), growing as sqrt(r) with Moonlight's.

    Over all x of independent entries of variance 1, the mean square of M x is that of the rows' norms of M.
    """
    generator = torch.Generator().manual_seed(1)
    for rank, wanted in zip((4, 16, 64), expected, strict=True):
        a = torch.empty(rank, 4096)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        assert rms_of_outputs(a) == pytest.approx(1 / math.sqrt(3), rel=1e-2)
        assert rms_of_outputs(update_of_b(rank, scale_mode) @ a) == pytest.approx(wanted, rel=1e-2), f"rank {rank}"


def test_targets_come_from_the_shapes_of_the_logical_factors() -> None:
    """sqrt(r / inputs) for A; for B sqrt(outputs / r), where outputs are those of the block."""
    layer = bridge(BridgeAdapter())
    groups = param_groups(model(layer), MuonConfig(scale_mode="unit_rms_norm"), weight_decay=0.0)
    found = factors(layer)
    scales = {
        factor: {
            block.name: scale_factor("unit_rms_norm", block.rows, block.columns)
            for block in weight.matrix_layout.blocks(tuple(weight.shape))
        }
        for factor, weight in found.items()
    }
    assert list(scales["A"].values()) == pytest.approx([math.sqrt(4 / 32)])
    assert scales["B"] == pytest.approx({"q": math.sqrt(32 / 4), "k": math.sqrt(16 / 4), "v": math.sqrt(16 / 4)})
    optimizer = Muon(groups.muon, lr=1.0, scale_mode="unit_rms_norm", **EXACT)
    before = {factor: weight.detach().clone() for factor, weight in found.items()}
    for weight in found.values():
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    a, b = (before[factor] - found[factor].detach() for factor in ("A", "B"))
    assert torch.linalg.matrix_norm(a, 2).item() == pytest.approx(math.sqrt(4 / 32), rel=1e-3)
    parts = dict(zip(("q", "k", "v"), split(found["B"].matrix_layout, b), strict=True))
    for name, part in parts.items():
        assert torch.linalg.svdvals(part).tolist() == pytest.approx([scales["B"][name]] * 4, rel=1e-3)


# --- on Megatron's layers ---


def train(layout: Layout, kind: str, rules: dict[str, Any]) -> tuple[dict[str, str], list[float]] | str:
    """A GPT with adapters on every ``linear_qkv``: who updates their factors, and losses; or the error."""
    import megatron_muon

    own = MuonConfig(**rules)
    megatron_muon.install(own)
    from megatron.core.optimizer import get_megatron_optimizer

    layout.initialize()
    chunks = harness.build_model(layout)
    for layer in chunks[0].decoder.layers:
        wrapper = ParallelLora(layer.self_attention.linear_qkv)
        if kind == "dora":
            rows = layer.self_attention.linear_qkv.weight.size(0)
            wrapper.adapter.weight_magnitude = torch.nn.Parameter(torch.ones(rows))
            wrapper.adapter.weight_magnitude.main_grad = None
        layer.self_attention.linear_qkv = wrapper
    wrapped = harness.wrap(chunks, layout)
    config = harness.optimizer_config(layout, **{f"muon_{name}": value for name, value in rules.items()})
    try:
        run = harness.Run(layout, wrapped, get_megatron_optimizer(config, wrapped))
    except ConfigError as error:
        return str(error)
    routes = {
        name: exclusion_reason(param) or "muon" for name, param in global_names(wrapped[0]) if ".adapter.linear" in name
    }
    return routes, run.losses(3)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(layer_wise=True)])
def test_a_to_adam_on_self_attention_of_megatron(pool: RankPool, layout: Layout) -> None:
    for result in pool.run(train, 2, layout, "lora", {"lora_a": "adam"}):
        routes, losses = result
        for name, route in routes.items():
            expected = "muon" if "linear_out" in name else "LoRA A, rank x inputs (--muon-lora-a adam)"
            assert route == expected, name
        assert len(routes) == 4 * 2 and losses[-1] < losses[0]


def test_dora_stops_all_ranks_of_megatron(pool: RankPool) -> None:
    """Not DDP, which lays out its buffers before anybody knows the optimizer: the factory."""
    for message in pool.run(train, 2, Layout(layer_wise=True), "dora", {}):
        assert message.startswith("decoder.layers.0.self_attention.linear_qkv.adapter and 3 more: DoRA")


def test_dora_with_adam_trains(pool: RankPool) -> None:
    """No forward pass uses these magnitudes, and overlap asks each weight for a gradient in the first step."""
    layout = Layout(tp=2, overlap=False)
    routes, losses = pool.run(train, 2, layout, "dora", {"param_rule": ("*.adapter.linear_*.weight=adam",)})[0]
    assert "muon" not in routes.values() and losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [("dist_spectral_sphere", {}), ("muon", {"variant": "hyperball", "scale_mode": "none"})],
)
def test_adapters_do_not_go_with_weights_that_keep_their_norm(optimizer: str, changes: dict[str, Any]) -> None:
    """B starts from zeros: it would stay there, or be blown up to the radius."""
    settings, muon = types.SimpleNamespace(optimizer=optimizer), MuonConfig(**changes)
    module = model(bridge(BridgeAdapter()))
    annotate(module)
    with pytest.raises(ConfigError, match=r"adapter\.linear_in\.weight: a factor of a low-rank adapter with"):
        check_adapters(global_names(module), settings, muon)
    check_adapters(global_names(module), types.SimpleNamespace(optimizer="muon"), MuonConfig())
    annotate(module, options("*adapter*=adam"))
    check_adapters(global_names(module), settings, muon)
