"""One optimizer for a whole model, where an optimizer of torch is expected: schedules, checkpoints, scalers, copies."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict as dcp

import megatron_muon
from megatron_muon import ConfigError, JointOptimizer, Muon, MuonConfig, optimizer_for, param_groups
from megatron_muon.routing.layout import SCALAR, MatrixLayout, Section

RULES = ("head.weight=adam",)
ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-9, "weight_decay": 0.3}


class Model(torch.nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(11, 6, sparse=sparse)
        self.up = torch.nn.Linear(6, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.down = torch.nn.Linear(8, 6, bias=False)
        self.head = torch.nn.Linear(6, 11, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.norm(self.up(self.table(tokens)))))


def model(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options).double()


def loss_of(module: torch.nn.Module, step: int = 0) -> torch.Tensor:
    tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
    return torch.nn.functional.cross_entropy(module(tokens).flatten(0, 1), tokens.flatten())


def made(module: torch.nn.Module, lr: Any = 1e-2, **options: Any) -> JointOptimizer:
    options = {"adam": ADAM, "param_rule": RULES, "fp32_matmul_prec": "highest", **options}
    return optimizer_for(module, lr, weight_decay=0.1, **options)


def train(module: torch.nn.Module, optimizers: Sequence[Any], steps: range, after: Callable[[], Any] = int) -> None:
    for step in steps:
        module.zero_grad()
        loss_of(module, step).backward()
        for optimizer in optimizers:
            optimizer.step()
        after()


def assert_alike(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, mine), its in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its), name


def two(module: torch.nn.Module) -> tuple[Muon, torch.optim.AdamW]:
    groups = param_groups(module, MuonConfig(param_rule=RULES))
    muon = Muon(groups.muon, lr=1e-2, weight_decay=0.1, scale_mode="moonlight", fp32_matmul_prec="highest")
    rest = [{**group, "weight_decay": group["weight_decay"] and 0.3} for group in groups.scalar]
    return muon, torch.optim.AdamW(rest, **ADAM)


def test_it_does_what_two_do() -> None:
    """Bit for bit, with a schedule over both, which keeps the ratio of their rates."""
    one, other = model(), model()
    optimizer, pair = made(one), two(other)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3, 1e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.3, 0.0]
    assert "head.weight" in optimizer.table
    rates = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in (optimizer, *pair)]
    train(one, [optimizer], range(4), rates[0].step)
    train(other, pair, range(4), lambda: [rate.step() for rate in rates[1:]])
    assert_alike(one, other)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(10 * optimizer.param_groups[1]["lr"]) == 2e-3
    assert optimizer.param_groups[2] is optimizer.scalar.param_groups[1]
    assert {*optimizer.state} == {*one.parameters()} == {p for g in optimizer.param_groups for p in g["params"]}
    assert set(optimizer.state[one.up.weight]) >= {"momentum_buffer"} and "exp_avg" in optimizer.state[one.up.bias]


@pytest.mark.parametrize("variant", ["none", "normuon", "spectral_sphere", "polargrad"])
def test_state_goes_on_where_it_was_saved(variant: str) -> None:
    one, other = model(), model()
    first = made(one, variant=variant)
    train(one, [first], range(2))
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": first.state_dict()}, file)
    train(one, [first], range(2, 4))
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # as Trainer reads it
    other.load_state_dict(saved["model"])
    second = made(other, lr=1.0, variant=variant)
    seen: list[str] = []
    second.register_load_state_dict_pre_hook(lambda *_: seen.append("before"))
    second.register_load_state_dict_post_hook(lambda *_: seen.append("after"))
    second.load_state_dict(saved["optimizer"])
    assert seen == ["before", "after"] and second.param_groups[0]["lr"] == 1e-2
    train(other, [second], range(2, 4))
    assert_alike(one, other)


def test_state_goes_to_weights_of_its_names_in_both_optimizers() -> None:
    """A model whose layers have been put in another order."""
    one, other = model(), model()
    for name in ("up", "table", "norm"):
        other._modules[name] = other._modules.pop(name)
    first = made(one)
    train(one, [first], range(2))
    other.load_state_dict(one.state_dict())
    second = made(other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert first.param_groups[0]["param_names"] != second.param_groups[0]["param_names"]
    assert first.param_groups[1]["param_names"] != second.param_groups[1]["param_names"]
    for each, optimizer in ((one, first), (other, second)):
        train(each, [optimizer], range(2, 4))
    for name, param in one.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), param, rtol=0, atol=1e-12)


def test_state_of_another_model_is_refused() -> None:
    state = made(model()).state_dict()
    with pytest.raises(ValueError, match="of another model"):
        made(model(), param_rule=()).load_state_dict(state)


def test_torchs_distributed_checkpoint() -> None:
    """Which takes a step at rate 0 to make state, names weights, and puts the names back."""
    one, other = model(), model()
    first, second = made(one), made(other)
    train(one, [first], range(2))
    saved, wanted = dcp.get_optimizer_state_dict(one, first), copy.deepcopy(one.state_dict())
    assert "down.weight" in saved["state"] and "norm.bias" in saved["state"]
    other.load_state_dict(wanted)
    dcp.set_optimizer_state_dict(other, second, copy.deepcopy(saved))  # torch's optimizers share what they load
    for module, optimizer in ((one, first), (other, second)):
        train(module, [optimizer], range(2, 4))
    assert_alike(one, other)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_go_on_by_themselves(how: Callable[[Any], Any]) -> None:
    one = model()
    first = made(one)
    train(one, [first], range(2))
    other, second = how((one, first))
    for module, optimizer in ((one, first), (other, second)):
        train(module, [optimizer], range(2, 4))
    assert_alike(one, other)
    assert second.param_groups[0] is second.muon.param_groups[0] is not first.param_groups[0]
    assert second.param_groups[0]["params"][0] is other.up.weight


def test_a_step_within_torch_compile() -> None:
    """It ended in an assertion of torch's, for the switches that a step sets."""
    one, other = model(), model()
    first, second = made(one), made(other)
    compiled = torch.compile(lambda: first.step(), backend="eager")
    for step in range(2):
        one.zero_grad()
        loss_of(one, step).backward()
        compiled()
    train(other, [second], range(2))
    assert_alike(one, other)


def test_closures_are_called_once_and_hooks_too() -> None:
    module, calls = model(), [0, 0, 0]
    optimizer = made(module)
    optimizer.register_step_pre_hook(lambda *_: calls.__setitem__(1, calls[1] + 1))
    optimizer.register_step_post_hook(lambda *_: calls.__setitem__(2, calls[2] + 1))

    def closure() -> torch.Tensor:
        calls[0] += 1
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first and calls == [2, 2, 2]
    optimizer.zero_grad()
    assert all(param.grad is None for param in module.parameters())


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.1, 0.01, 0.01], total_steps=9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [2]
        ),
    ],
)
def test_schedules(schedule: Callable[[Any], Any]) -> None:
    module = model()
    optimizer = made(module)
    scheduler = schedule(optimizer)
    for step in range(5):
        train(module, [optimizer], range(step, step + 1), scheduler.step)
        ratio = optimizer.muon.param_groups[0]["lr"] / optimizer.scalar.param_groups[0]["lr"]
        assert ratio == pytest.approx(10)


def test_gradient_scaling() -> None:
    """A step with infinity is left out as a whole; another has the gradients as they are without the scaler."""
    one, other = model(), model()
    first, second = made(one), made(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(one)).backward()
    one.up.weight.grad[0, 0] = torch.inf
    scaler.step(first)
    scaler.update()
    assert_alike(one, other)
    first.zero_grad()
    scaler.scale(loss_of(one)).backward()
    scaler.step(first)
    train(other, [second], range(1))
    assert_alike(one, other)


def test_a_wrapper_as_lightnings() -> None:
    """It takes the optimizer's attributes and class, and steps with a closure; state is put back in another place."""
    module = model()
    optimizer = made(module)

    class Wrapper:
        def __init__(self) -> None:
            self.__dict__ = {name: value for name, value in vars(optimizer).items() if name != "step"}
            self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

        def step(self, closure: Any) -> Any:
            return optimizer.step(closure)

    wrapped: Any = Wrapper()

    def closure() -> torch.Tensor:
        wrapped.zero_grad()
        loss = loss_of(module)
        loss.backward()
        return loss

    losses = [wrapped.step(closure)]
    for param, state in wrapped.state.items():
        wrapped.state[param] = {name: copy.copy(value) for name, value in state.items()}
    losses.append(wrapped.step(closure))
    assert losses[1] < losses[0] and len(wrapped.state) == len(wrapped.state_dict()["state"]) == 7
    assert optimizer.muon.state[module.up.weight] is wrapped.state[module.up.weight]


def test_rows_of_a_fused_weight_have_adamws_rates() -> None:
    """They are updated as a weight of their own under the second optimizer would be."""
    module, alone = model(), torch.nn.Parameter(model().down.weight.detach()[4:].clone())
    module.down.weight.matrix_layout = MatrixLayout("gated", (Section("z", 4), Section("beta", 2, SCALAR)))
    from megatron_muon.optimizers.joint import _of_rows

    optimizer = JointOptimizer(
        module,
        Muon(
            [{"params": [module.up.weight, module.down.weight]}], lr=1e-2, weight_decay=0.1, **_of_rows(ADAM, 1e-2, 0.1)
        ),
        torch.optim.AdamW([module.table.weight, module.up.bias, *module.norm.parameters(), module.head.weight], **ADAM),
    )
    reference = torch.optim.AdamW([alone], **ADAM)
    for step in range(3):
        train(module, [optimizer], range(step, step + 1))
        alone.grad = module.down.weight.grad[4:].clone()
        reference.step()
    torch.testing.assert_close(module.down.weight[4:], alone, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="Give Muon one"):
        _of_rows(ADAM, 1e-2, 0.0)


def test_weights_that_nobody_has_stop_a_step_before_anything_moves() -> None:
    module = model()
    module.up.requires_grad_(False)
    optimizer = made(module)
    module.up.requires_grad_(True)
    before = copy.deepcopy(module)
    loss_of(module).backward()
    with pytest.raises(ConfigError, match=r"up\.weight, up\.bias: trained by the model, and not in exactly one"):
        optimizer.step()
    module.zero_grad()
    module.up.requires_grad_(False)
    train(module, [optimizer], range(1))
    module.up.requires_grad_(True)  # later than the first step
    before = copy.deepcopy(module)
    loss_of(module).backward()
    with pytest.raises(ConfigError, match=r"up\.weight, up\.bias: frozen when the optimizer was made"):
        optimizer.step()
    assert_alike(module, before)
    optimizer.add_param_group({"params": module.up.parameters(), "lr": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3, 1e-3, 0.5, 0.5]
    assert optimizer.param_groups[3]["param_names"] == ["up.weight"] and optimizer.param_groups[4]["weight_decay"] == 0
    assert optimizer.param_groups[3] is optimizer.muon.param_groups[1]
    optimizer.step()
    assert not torch.equal(module.up.weight, before.up.weight) and not torch.equal(module.up.bias, before.up.bias)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[3] is optimizer.muon.param_groups[1]


@pytest.mark.parametrize("steps", [0, 2])
def test_weights_that_are_replaced_stop_the_next_step(steps: int) -> None:
    """After the first step they were not looked for."""
    module = model()
    optimizer = made(module)
    train(module, [optimizer], range(steps))
    module.table = torch.nn.Embedding(12, 6).double()
    loss_of(module).backward()
    with pytest.raises(ConfigError, match=r"table\.weight: trained by the model, and not in .* made afterwards"):
        optimizer.step()


def test_what_is_wrong_is_refused() -> None:
    module = model()
    with pytest.raises(TypeError, match=r"adam=\.\.\.\) with maximize: give some of lr, betas"):
        made(module, adam={"maximize": True})
    for name, value in {"num_steps": 7, "log_interval": 10, "transfer": "256x4"}.items():  # the last are a run's
        with pytest.raises(TypeError, match=f"no option {name}"):
            made(module, **{name: value})
    with pytest.raises(TypeError, match=r"scalar_betas=\.\.\.\): .* give adam="):
        made(module, scalar_betas=(0.9, 0.9))
    for rule, message in {
        "up.weight=stiefel": "use variant stiefel, or another",
        "*.wieght=adam": "no trainable",
    }.items():
        with pytest.raises(ConfigError, match=rf"param_rule=\('{re.escape(rule)}',\).*{message}"):
            made(module, param_rule=(rule,))
    with pytest.raises(ConfigError, match=r"no trained weight is Muon's"):
        made(module, param_rule=("*=adam",))
    sparse = model(sparse=True)
    optimizer = made(sparse)
    before = copy.deepcopy(sparse)
    loss_of(sparse).backward()
    with pytest.raises(ConfigError, match=r"table\.weight: its gradient is sparse"):
        optimizer.step()
    assert_alike(sparse, before)
    optimizer = made(module)
    with pytest.raises(ConfigError, match="1 weights that are not the model's"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))]})
    with pytest.raises(ConfigError, match="in exactly one of the two"):
        JointOptimizer(module, Muon(param_groups(module).muon), torch.optim.AdamW([module.up.weight]))
    optimizer.param_groups = [{**group} for group in optimizer.param_groups]
    with pytest.raises(ConfigError, match="not those of its two optimizers"):
        optimizer.step()


def test_state_in_other_hands() -> None:
    """Counted, put to sleep and started anew, as that of two optimizers is."""
    one, other = model(), model()
    optimizer = made(one)
    train(one, [optimizer], range(2))
    kept = megatron_muon.state_bytes(optimizer).on_device
    assert kept["momentum_buffer"] == 2 * 48 * 8 and "exp_avg_sq" in kept
    assert megatron_muon.sleep(optimizer) >= 0
    with pytest.raises(ConfigError, match="asleep"):
        optimizer.step()
    megatron_muon.wake(optimizer)
    megatron_muon.reset(optimizer)
    other.load_state_dict(one.state_dict())
    train(one, [optimizer], range(2, 4))
    train(other, [made(other)], range(2, 4))
    assert_alike(one, other)


def test_a_model_of_matrices_alone() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    optimizer = optimizer_for(module, 0.1)
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert torch.isfinite(module[0].weight).all() and len(optimizer.param_groups) == 2
