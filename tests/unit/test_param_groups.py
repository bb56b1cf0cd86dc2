"""Options of param groups: what works in each, what is refused, and learning rates that are tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_muon import ConfigError, Muon
from megatron_muon.routing.layout import SCALAR, WHOLE, MatrixLayout, Section
from tests.unit.test_checkpoint_sums import Quantized

GATED = MatrixLayout("in_proj", (Section("q", 8), Section("beta", 2, SCALAR)))
SIGN = replace(WHOLE, direction="sign")


def parameter(seed: int, layout: MatrixLayout = WHOLE, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(10, 6, dtype=dtype, generator=generator))
    param.matrix_layout = layout
    return param


def stepped(optimizer: Muon, steps: int = 3) -> list[torch.Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(steps):
        for param in params:
            generator = torch.Generator().manual_seed(100 + step)
            param.grad = torch.randn(param.shape, dtype=param.dtype, generator=generator)
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize(
    ("own", "layout"),
    [
        ({"nesterov": True}, WHOLE),
        ({"nesterov": True, "momentum": 0.5}, SIGN),
        ({"momentum": 0.0, "lr": 0.3, "weight_decay": 0.0}, WHOLE),
        ({"scale_mode": "unit_rms_norm", "extra_scale_factor": 0.2}, WHOLE),
        ({"scale_mode": "update_norm"}, WHOLE),
        ({"scale_mode": "spectral_norm"}, WHOLE),
        *(
            ({"weight_decay_method": name}, WHOLE)
            for name in ("independent", "independent_scheduled", "l2", "cautious")
        ),
        ({"weight_decay_method": "l2"}, SIGN),
        ({"ball_radius": 3.0}, SIGN),
        ({"scalar_betas": (0.5, 0.6), "scalar_eps": 1e-3, "scalar_lr_mult": 2.0, "scalar_wd_mult": 3.0}, GATED),
        ({"scalar_optimizer": "lion"}, GATED),
    ],
)
def test_options_work_per_group(own: dict[str, Any], layout: MatrixLayout) -> None:
    """As if the group were an optimizer of its own; its neighbours have the optimizer's."""
    options = {"lr": 0.1, "weight_decay": 0.3, "fp32_matmul_prec": "highest"}
    groups = [{"params": [parameter(0, layout)]}, {"params": [parameter(1, layout)], **own}]
    together = stepped(Muon(groups, **options))
    plain = stepped(Muon([parameter(0, layout)], **options))
    apart = stepped(Muon([parameter(1, layout)], **{**options, **own}))
    torch.testing.assert_close(together, [*plain, *apart], rtol=0, atol=1e-12)
    assert (apart[0] - stepped(Muon([parameter(1, layout)], **options))[0]).abs().max() > 1e-4


REFUSED = [
    ("none", {"wd": 0.1}, r"^wd in a param group: there is no such option \(did you mean weight_decay\?\)"),
    ("none", {"nestrov": True}, r"^nestrov .* \(did you mean nesterov\?\)"),
    ("none", {"maximize": True}, "^maximize in a param group: there is no such option"),
    ("none", {"num_ns_steps": 3}, "^num_ns_steps in a param group: it is an option of the whole optimizer"),
    ("none", {"eps": 1e-3}, "^eps in a param group: it is an option of the whole"),
    ("none", {"variant": "hyperball"}, "^variant in a param group: it is an option of the whole"),
    ("namo", {"beta2": 0.5}, "^beta2 in a param group: it is an option of the whole"),
    ("none", {"momentum": 1.5}, "momentum 1.5"),
    ("none", {"lr": -1.0}, "^lr -1.0: give a finite number of at least 0"),
    ("none", {"lr": float("nan")}, "^lr nan"),
    ("none", {"lr": torch.tensor(-1.0)}, "^lr -1"),
    ("none", {"lr": torch.ones(2)}, "^lr tensor"),
    ("none", {"weight_decay": "0.1"}, "^weight_decay '0.1': give a finite number"),
    ("none", {"scalar_betas": (0.9, 1.0)}, "^scalar_betas"),
    ("none", {"scalar_optimizer": "sgd"}, "scalar_optimizer sgd"),
    ("none", {"nesterov": 1}, "nesterov"),
    ("none", {"scale_mode": "spectrum"}, r"scale_mode spectrum: .* \(did you mean spectral\?\)"),
    ("none", {"extra_scale_factor": 0.0}, "extra_scale_factor 0.0"),
    ("none", {"weight_decay_method": "l1"}, "weight_decay_method l1"),
    ("none", {"damping_depth": 2.0}, "^damping_depth 2.0 in a param group of an optimizer without"),
    ("spectral_sphere", {"scale_mode": "moonlight"}, "scale_mode moonlight with variant spectral_sphere"),
    (
        "namo",
        {"scale_mode": "update_norm"},
        "variant namo with scale_mode update_norm",
    ),
]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(kind: type[np.floating[Any]]) -> None:
    numbers = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125}
    optimizer, expected = Muon([parameter(0)]), Muon([parameter(0)], **numbers)
    optimizer.param_groups[0].update({name: kind(number) for name, number in numbers.items()})
    assert torch.equal(stepped(optimizer)[0], stepped(expected)[0])


@pytest.mark.parametrize(("variant", "own", "message"), REFUSED)
def test_what_a_group_cannot_have_is_refused_and_leaves_nothing(
    variant: str, own: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [parameter(0)], **own}], variant=variant)
    first, expected = (Muon([parameter(0)], variant=variant) for _ in range(2))
    group = {"params": [parameter(1)], **own}
    before = dict(group)
    with pytest.raises(ValueError, match=message):
        first.add_param_group(group)
    assert group == before and len(first.param_groups) == 1
    assert torch.equal(stepped(first)[0], stepped(expected)[0])


def test_weights_that_are_refused_leave_nothing() -> None:
    optimizer, expected = Muon([parameter(0)]), Muon([parameter(0)])
    with pytest.raises(ValueError, match="2-D weights"):
        optimizer.add_param_group({"params": [parameter(1), torch.nn.Parameter(torch.zeros(3))]})
    assert torch.equal(stepped(optimizer)[0], stepped(expected)[0])
    optimizer.add_param_group({"params": [parameter(1)]})
    assert len(stepped(optimizer)) == 2
    optimizer.is_complete = True
    with pytest.raises(ConfigError, match="get_megatron_optimizer has built"):
        optimizer.add_param_group({"params": [parameter(2)]})


@pytest.mark.parametrize(
    ("edited", "message"),
    [
        ({"scale_mode": "spectrum"}, "scale_mode spectrum: .*did you mean spectral"),
        ({"scale_mode": ["spectral"]}, "scale_mode"),
        ({"weight_decay": float("inf")}, "^weight_decay inf: give a finite number"),
        ({"weight_decay": torch.tensor(float("nan"))}, "^weight_decay nan: give a finite number"),
        ({"lr": None}, "^lr None"),
        ({"scalar_betas": 0.9}, "^scalar_betas"),
        ({"momentum": 1.0}, "momentum 1.0"),
        ({"damping_depth": 2.0}, "^damping_depth 2.0 in a param group of an optimizer without"),
    ],
)
def test_groups_edited_between_steps_are_refused_before_anything_changes(edited: dict[str, Any], message: str) -> None:
    """The second of two groups: the first was written, and then the step raised."""
    optimizer, expected = (Muon([{"params": [parameter(seed)]} for seed in (0, 1)]) for _ in range(2))
    before = dict(optimizer.param_groups[1])
    optimizer.param_groups[1].update(edited)
    with pytest.raises(ValueError, match=message):
        stepped(optimizer)
    optimizer.param_groups[1].update(before)
    for name in edited.keys() - before.keys():
        del optimizer.param_groups[1][name]
    for mine, others in zip(stepped(optimizer), stepped(expected), strict=True):
        assert torch.equal(mine, others)


def test_a_schedule_of_an_option_is_not_kept_for_ever() -> None:
    optimizer = Muon([parameter(0)])
    for number in range(40):
        optimizer.param_groups[0]["momentum"] = 0.5 + 0.01 * number
        optimizer.refuse_step()
    assert len(optimizer._accepted) == 32
    optimizer.param_groups[0]["momentum"] = 1.0
    with pytest.raises(ConfigError, match=r"momentum 1\.0"):
        optimizer.refuse_step()


def test_a_step_in_inference_mode_is_refused() -> None:
    optimizer = Muon([parameter(0)])
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"within torch.inference_mode\(\)"):
        stepped(optimizer)
    assert not optimizer.state and len(stepped(optimizer)) == 1


def test_weights_without_numbers_of_their_own_are_refused() -> None:
    quantized = torch.nn.Parameter(Quantized(torch.ones(4, 6, dtype=torch.int8), 0.5))
    for weight, message in (
        (quantized, r"4 x 6 is quantized \(Quantized\)"),
        (torch.nn.Parameter(torch.ones(4, 6).to(torch.float8_e4m3fn)), "4 x 6 is of torch.float8_e4m3fn"),
        (torch.nn.Parameter(torch.ones(4, 6, dtype=torch.complex64)), "4 x 6 is of torch.complex64"),
    ):
        with pytest.raises(ConfigError, match=message):
            Muon([weight])


def test_what_others_write_to_groups_passes() -> None:
    """Megatron-Core, NeMo, and torch's schedulers."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    names = [*param_group_identifier_keys, "default_config", "pre_wd_mult", "pre_lr_mult", "name"]
    optimizer = Muon([{"params": [parameter(1)], **dict.fromkeys(names, 1.0)}], lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3)
    optimizer.add_param_group({key: each for key, each in optimizer.param_groups[0].items() if key != "params"} | {
        "params": [parameter(0)]
    })  # fmt: skip
    assert len(stepped(optimizer)) == 2


def test_schedules_that_end_a_rounding_below_0_pass() -> None:
    optimizer = Muon([parameter(0)], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 0.0, total_iters=7)
    for _ in range(8):
        stepped(optimizer)
        schedule.step()
    assert -1e-17 < optimizer.param_groups[0]["lr"] < 0.0


class Calls(TorchDispatchMode):
    """Counts operations; tells what has been read by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


STIEFEL = replace(WHOLE, direction="stiefel")


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        *((GATED, {"weight_decay_method": name}) for name in ("decoupled", "independent_scheduled", "cautious")),
        (GATED, {"scalar_optimizer": "lion"}),
        (SIGN, {}),
        (WHOLE, {"variant": "hyperball", "scale_mode": "none"}),
        (WHOLE, {"variant": "spectral_sphere"}),
        (STIEFEL, {"variant": "stiefel"}),
    ],
)
def test_a_rate_may_be_a_tensor(layout: MatrixLayout, options: dict[str, Any]) -> None:
    """The weights of a group are updated together, however many there are; one of the CPU is read for its group alone.

    That those of a GPU are not read is tested in ``tests/fake_cuda/test_steps.py``.
    """
    found, calls = {}, {}
    for kind in ("number", "tensor"):
        for count in (1, 3):
            rate: Any = 0.125 if kind == "number" else torch.tensor([0.125], dtype=torch.float64)
            params = [parameter(seed, layout) for seed in range(count)]
            made = Muon(params, lr=rate, weight_decay=0.25, fp32_matmul_prec="highest", **options)
            stepped(made, 1)
            for group in made.param_groups:  # as schedulers do
                if kind == "tensor":
                    group["lr"].fill_(0.0625)
                else:
                    group["lr"] = 0.0625
            with Calls() as seen:
                made.step()
            found[kind], calls[kind, count] = [param.detach() for param in params], seen.names
    torch.testing.assert_close(found["tensor"], found["number"], rtol=0, atol=1e-12)
    reads = {key: sum("_local_scalar" in name for name in names) for key, names in calls.items()}
    assert reads["tensor", 1] - reads["number", 1] == reads["tensor", 3] - reads["number", 3]
    if options.get("variant") not in ("spectral_sphere", "stiefel"):
        added = [sum("foreach_add_" in name for name in calls["tensor", count]) for count in (1, 3)]
        assert added[0] == added[1] > 0


def test_a_tensor_rate_does_not_round_updates_of_16_bits() -> None:
    """Times a rate they are added in the numbers of the weights."""
    found = []
    for rate in (0.1, torch.tensor(0.1)):
        optimizer = Muon([parameter(0)], lr=rate, ns_dtype="bf16")
        found.append(stepped(optimizer, 1)[0].float())
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)  # 1e-3 where the product is rounded to bfloat16


def test_rates_of_several_groups_may_be_tensors_on_the_manifold() -> None:
    found = []
    for rates in ((0.125, 0.25), (torch.tensor(0.125, dtype=torch.float64), 0.25)):
        groups = [{"params": [parameter(seed, STIEFEL)], "lr": rate} for seed, rate in enumerate(rates)]
        found.append(stepped(Muon(groups, variant="stiefel")))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
