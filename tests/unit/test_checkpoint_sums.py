"""Sums by which tensors of checkpoints are recognised: additive over shards, and no two tensors have the same."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_muon.checkpoint import fingerprint
from megatron_muon.checkpoint.fingerprint import added, fingerprints, fits
from megatron_muon.checkpoint.weights import _comparable, described, is_plain, sums_of
from megatron_muon.errors import ConfigError
from megatron_muon.plugin.factory import _check_numbers

Offset = tuple[int, ...]


def random_shards(
    x: torch.Tensor, offset: Offset, chance: random.Random, depth: int
) -> list[tuple[torch.Tensor, Offset]]:
    """Cut along random axes at random places, some shards empty."""
    if depth == 0 or x.dim() == 0:
        return [(x, offset)]
    axis = chance.randrange(x.dim())
    at = chance.randint(0, x.shape[axis])
    moved = (*offset[:axis], offset[axis] + at, *offset[axis + 1 :])
    first, second = x.split((at, x.shape[axis] - at), axis)
    return random_shards(first, offset, chance, depth - 1) + random_shards(second, moved, chance, depth - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (37,), (1, 9), (12, 1), (13, 24), (5, 6, 7), (2, 3, 4, 5)])
def test_sums_of_all_shardings_are_those_of_the_whole(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere, in any order in memory, and however much is summed at once."""
    chance = random.Random(repr((dtype, shape)))
    x = (100 * torch.randn(shape)).abs().to(dtype)
    (whole,) = fingerprints([x])
    for trial in range(8):
        monkeypatch.setitem(fingerprint._PIECE, "cpu", chance.choice((1, 4, 30, 1 << 17)))
        shards = random_shards(x, (0,) * x.dim(), chance, depth=4)
        tensors, offsets = zip(*shards, strict=True)
        if trial % 2:  # columns of a larger tensor, and transposed memory
            tensors = tuple(t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t for t in tensors)
        sums = fingerprints(tensors, offsets)
        assert list(added(("x", value) for value in sums).values()) == [whole]


def test_sums_of_nothing() -> None:
    assert fingerprints([]) == [] and fingerprints([torch.empty(0, 3)]) == [0]
    zeros = fingerprints([torch.zeros(4), torch.zeros(5), torch.zeros(2, 2)])
    assert len({0, *zeros}) == 4, "zeros that are missing are missed"


def test_plain_sum_is_that_of_earlier_versions() -> None:
    for x, integers in ((torch.randn(9, 5), torch.int32), (torch.randn(9).bfloat16(), torch.int16)):
        (found,) = fingerprints([x])
        old = int(x.view(integers).sum(dtype=torch.int64)) % 2**64
        assert found % 2**64 == old != found
        assert fits(old, found) and fits(found, found) and fits(None, found)
        assert not fits(old ^ 1, found) and not fits(found ^ (1 << 70), found)


def test_sums_see_each_bit() -> None:
    for dtype, integers in ((torch.float64, torch.int64), (torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        x = torch.randn(3, 4).to(dtype)
        seen = set(fingerprints([x]))
        for bit in range(8 * x.element_size()):
            y = x.clone()
            y.view(integers)[1, 2] ^= 1 << bit if bit < 8 * x.element_size() - 1 else torch.iinfo(integers).min
            seen |= set(fingerprints([y]))
        assert len(seen) == 1 + 8 * x.element_size()


def exchanged(x: torch.Tensor, first: int, second: int, axis: int = 0) -> torch.Tensor:
    order = list(range(x.shape[axis]))
    order[first], order[second] = order[second], order[first]
    return x.index_select(axis, torch.tensor(order))


MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows rotated": lambda x: x.roll(1, 0),
    "two rows": lambda x: exchanged(x, 2, 5),
    "neighbours": lambda x: exchanged(x, 2, 3, axis=1),
    "halves": lambda x: x.roll(len(x) // 2, 0),
    "columns' halves": lambda x: x.roll(x.shape[1] // 2, 1),
    "transposed": lambda x: x.t().contiguous(),
    "interleaved": lambda x: x.view(2, -1, x.shape[1]).transpose(0, 1).reshape(x.shape),
    "shifted by one": lambda x: x.flatten().roll(1).view(x.shape),
    "a row's elements": lambda x: torch.cat([x[:1].flip(1), x[1:]]),
    "signs of two": lambda x: torch.cat([x[:1].neg(), x[1:2].neg(), x[2:]]),
}

CONTENTS: dict[str, Callable[[], torch.Tensor]] = {
    "float32": lambda: torch.randn(32, 32),
    "bfloat16": lambda: torch.randn(32, 32).bfloat16(),
    "float32 of bfloat16": lambda: torch.randn(32, 32).bfloat16().float(),
    "float64 signs": lambda: torch.randn(32, 32).double().sign(),
    "zeros of both signs": lambda: torch.randn(32, 32).sign() * 0,
    "equal sums of rows": lambda: torch.stack([torch.arange(32.0)[torch.randperm(32)] for _ in range(32)]),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_sums_see_what_has_moved(content: str) -> None:
    """Not by luck: of two sums that differ, the last bits differ almost as often as those of random numbers."""
    torch.manual_seed(0)
    last: list[int] = []
    for _ in range(24):
        x = CONTENTS[content]()
        values = [fingerprints([x])[0] >> 64]
        values += [fingerprints([move(x)])[0] >> 64 for move in MOVES.values()]
        assert len(set(values)) == len(values)
        last += [(value - values[0]) % 2**64 for value in values[1:]]
    # One bit on average by chance, one for each factor that is a difference of odd numbers, up to three if all elements
    # that differ do so by the same number. The other 58 would have to be the same by chance.
    zeros = [(value & -value).bit_length() - 1 for value in last]
    assert max(zeros) < 24 and sum(zeros) / len(zeros) < 6


# --- what has no bits of its own -------------------------------------------------------------------------------------


class Quantized(torch.Tensor):
    """Like Transformer Engine's: integers and a scale, in a class with its own ``view`` and caches beside them."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: float) -> Quantized:
        found = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.bfloat16)
        found.numbers, found.scale = numbers, scale
        return found

    def dequantize(self) -> torch.Tensor:
        return self.numbers.to(torch.bfloat16) * self.scale

    def view(self, *shape: object) -> torch.Tensor:
        return Quantized(self.numbers.view(*shape), self.scale)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.detach.default:
            return Quantized(args[0].numbers, args[0].scale)
        plain = [arg.dequantize() if isinstance(arg, Quantized) else arg for arg in args]
        return func(*plain, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


class Foreign(Quantized):
    """Of which nothing is known."""

    dequantize = torch.Tensor.dequantize


def test_quantized_weights_are_compared_by_what_they_stand_for() -> None:
    numbers = torch.arange(24, dtype=torch.int8).view(4, 6)
    moved = numbers.roll(1, 0)
    same, again, other, scaled = (
        fingerprints([_comparable(torch.nn.Parameter(Quantized(each, scale)).data)])[0]
        for each, scale in ((numbers, 0.5), (numbers.clone(), 0.5), (moved, 0.5), (numbers, 0.25))
    )
    assert same == again and len({same, other, scaled}) == 3
    assert _comparable(Foreign(numbers, 1.0)).numel() == 0
    assert not is_plain(torch.nn.Parameter(Quantized(numbers, 0.5)))


def test_quantized_weights_that_are_trained_are_refused_by_name() -> None:
    """Frozen ones, under adapters, stay as they are."""
    weight = torch.nn.Parameter(Quantized(torch.ones(2, 3, dtype=torch.int8), 0.5))
    with pytest.raises(ConfigError, match=r"^layers.0.weight is quantized \(Quantized\).* \(no fp8_param"):
        _check_numbers([("layers.0.weight", weight)])
    _check_numbers([("layers.0.weight", weight.requires_grad_(False)), ("other", Special(torch.ones(2, 3)))])


class Special(torch.nn.Parameter):
    """A parameter with attributes; its bits are its own."""


def test_only_quantized_weights_are_left_out_of_the_sums() -> None:
    def tensor(key: str, data: torch.Tensor) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, data, replica_id=(0, 0, 0))

    weights = {"plain": torch.ones(2, 3), "special": Special(torch.ones(2, 3)), "buffer": torch.ones(())}
    state = {key: tensor(key, value) for key, value in weights.items()}
    state["quantized"] = tensor("quantized", Quantized(torch.ones(2, 3, dtype=torch.int8), 1.0))
    assert sums_of(described(state)).keys() == {(name, "weight") for name in weights}
