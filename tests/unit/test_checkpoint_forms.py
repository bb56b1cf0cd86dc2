"""State as checkpoints have it, in whatever form an optimizer keeps it: the same numbers, read into every form."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.checkpoint.param_state import MASTER, MOMENTUM_DTYPE, ParamState
from megatron_muon.optimizers import storage
from megatron_muon.optimizers.storage import MOMENTUM, REMAINDER, SCALE, TIES, master_of, momentum_of

SHAPE = (6, 300)  # a block of columns, and a part of one
FORMS = [(master, momentum) for master in ("fp32", "remainder") for momentum in ("fp32", "bf16", "int8")]


def numbers(seed: int) -> torch.Tensor:
    """Of all magnitudes, some of them half way between two bfloat16 numbers."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(SHAPE, generator=generator) * 10 ** torch.randint(-9, 4, SHAPE, generator=generator)
    special = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000, 0, 1, 0x8000, 0x18000, 0x7FFF])
    found[0, :8] = special.to(torch.int32).view(torch.float32)
    return found


def state_of(master: str, momentum: str, weight: torch.Tensor, average: torch.Tensor) -> ParamState:
    """A weight's state in a form, as an optimizer of Megatron-Core or of torch has it."""
    param = torch.nn.Parameter(weight.bfloat16())
    key = weight.clone() if master == "fp32" else param
    optimizer = Muon([key])
    state = optimizer.state[key]
    if master == "remainder":
        storage.init_remainder(key, state)
        storage.write(master_of(key, state), weight)
    storage.init_momentum(key, state, momentum)
    storage.write(momentum_of(state), average)
    return ParamState(param, optimizer, optimizer.param_groups[0], key, key if master == "fp32" else None)


@pytest.mark.parametrize("source", FORMS)
def test_every_form_reads_what_every_form_has_saved(source: tuple[str, str]) -> None:
    weight, average = numbers(1), numbers(2)
    saved = state_of(*source, weight, average)
    assert set(saved.saved) == set(saved.states) == {MASTER, MOMENTUM}, "nothing of the form"
    assert torch.equal(saved.saved[MASTER].view(torch.int32), weight.view(torch.int32))
    kept = storage.read(momentum_of(saved.inner.state[saved.key])).clone()
    dtype = torch.bfloat16 if source[1] == "bf16" else torch.float32
    assert saved.saved[MOMENTUM].dtype == dtype and torch.equal(saved.saved[MOMENTUM].float(), kept)
    assert saved.numbers[MOMENTUM_DTYPE] == source[1] and not {"master", "offload"} & set(saved.numbers)
    for target in FORMS:
        read = state_of(*target, numbers(3), numbers(4))
        before = dict(read.inner.state[read.key])
        places = {name: read.read_as(name, tensor.dtype) for name, tensor in saved.saved.items()}
        for name, tensor in saved.saved.items():
            assert places[name].dtype == tensor.dtype and places[name] is read.saved[name]
            places[name].copy_(tensor)
        read.take()
        state = read.inner.state[read.key]
        assert state.keys() == before.keys() and all(state[name] is before[name] for name in before), "in place"
        assert torch.equal(read.saved[MASTER].view(torch.int32), weight.view(torch.int32))
        if target[0] == "remainder":
            assert torch.equal(read.param, weight.bfloat16())
        expected = state_of(*target, weight, kept)
        found, wanted = (each.inner.state[each.key] for each in (read, expected))
        for name in (MOMENTUM, SCALE, REMAINDER, TIES):
            assert (name in found) == (name in wanted)
            assert name not in wanted or torch.equal(found[name], wanted[name]), name
        if target[1] in (source[1], "fp32"):
            assert torch.equal(storage.read(momentum_of(found)), kept), "nothing is rounded"


@pytest.mark.parametrize("momentum", ["fp32", "bf16", "int8"])
def test_what_was_not_read_stays(momentum: str) -> None:
    """State that a checkpoint has not, and rows of a vocabulary that it does not pad."""
    held = state_of("remainder", momentum, numbers(1), numbers(2))
    before = copy.deepcopy(dict(held.inner.state[held.key])), held.param.clone()
    held.read_as(MOMENTUM, torch.bfloat16 if momentum == "bf16" else torch.float32)
    held.saved[MASTER][1:3] = 5.0
    held.take()
    after = held.inner.state[held.key]
    rest = [0, *range(3, SHAPE[0])]
    assert torch.equal(held.param[rest], before[1][rest]) and (held.param[1:3] == 5.0).all()
    for name, tensor in before[0].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(after[name][rest], tensor[rest]), name


def test_later_steps_do_not_change_what_is_saved() -> None:
    """Copies are made of what is kept otherwise; what is kept as it is saved is the state itself, as before."""
    held = state_of("remainder", "int8", numbers(1), numbers(2))
    saved = {name: tensor.clone() for name, tensor in held.saved.items()}
    state = held.inner.state[held.key]
    storage.write(master_of(held.key, state), numbers(3))
    storage.write(momentum_of(state), numbers(4))
    assert all(torch.equal(held.saved[name], tensor) for name, tensor in saved.items())


def test_state_on_the_host_of_a_weight_on_a_device_is_copied_to_be_saved() -> None:
    """Whoever writes in the background shares what is on the host with later steps."""
    key = numbers(1)
    optimizer = Muon([key])
    storage.init_momentum(key, optimizer.state[key], "fp32")
    for device, is_copied in (("meta", True), ("cpu", False)):
        held = ParamState(torch.nn.Parameter(key.to(device)), optimizer, optimizer.param_groups[0], key, key)
        held.keep_apart()
        assert [held.saved[name] is not tensor for name, tensor in held.tensors.items()] == [is_copied] * 2
        assert all(torch.equal(held.saved[name], tensor) for name, tensor in held.tensors.items())


# --- state_dict() of plain torch -------------------------------------------------------------------------------------


def muon(weight: torch.Tensor, master: str, momentum: str) -> Muon:
    return Muon([torch.nn.Parameter(weight.clone().bfloat16())], lr=0.02, master=master, momentum_dtype=momentum)


def train(optimizer: Muon, seed: int, steps: int = 2) -> None:
    (param,) = optimizer.param_groups[0]["params"]
    for step in range(steps):
        param.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed + step)).bfloat16()
        optimizer.step()


def through_a_file(optimizer: Muon, master: str, momentum: str) -> Muon:
    """Another one with its weight and state."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = muon(optimizer.param_groups[0]["params"][0].detach(), master, momentum)
    again.load_state_dict(torch.load(file))
    return again


def contents(optimizer: Muon) -> dict[str, torch.Tensor]:
    (param,) = optimizer.param_groups[0]["params"]
    state = {name: value for name, value in optimizer.state[param].items() if isinstance(value, torch.Tensor)}
    return {"weight": param.detach(), **state}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", [("fp32", "auto"), ("fp32", "fp32"), *FORMS[3:]])
def test_a_state_dict_is_not_rounded(form: tuple[str, str]) -> None:
    """torch gives all state the type of its weight."""
    optimizer = muon(numbers(1), *form)
    train(optimizer, 5)
    again = through_a_file(optimizer, *form)
    assert same(contents(again), contents(optimizer))
    train(optimizer, 7)
    train(again, 7)
    assert same(contents(again), contents(optimizer))


def test_a_state_dict_of_another_form_is_read() -> None:
    optimizer = muon(numbers(1), "remainder", "int8")
    train(optimizer, 5)
    before, weight = contents(optimizer), optimizer.param_groups[0]["params"][0]
    held = storage.read(momentum_of(optimizer.state[weight]))
    wide = contents(through_a_file(optimizer, "remainder", "fp32"))
    assert SCALE not in wide and torch.equal(wide[MOMENTUM], held)
    assert torch.equal(wide[REMAINDER], before[REMAINDER]) and torch.equal(wide[TIES], before[TIES])
    plain = through_a_file(optimizer, "fp32", "auto")
    assert not {REMAINDER, TIES, SCALE} & contents(plain).keys(), "the weight is its own master"
    assert torch.equal(contents(plain)[MOMENTUM], held.bfloat16())
    back = contents(through_a_file(plain, "remainder", "int8"))
    assert not back[REMAINDER].any() and back[MOMENTUM].dtype == torch.int8
