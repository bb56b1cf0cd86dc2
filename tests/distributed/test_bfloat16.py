"""Numbers of Newton-Schulz on processors with and without 16-bit units, and on ranks that differ in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.config import MuonConfig
from megatron_muon.optimizers.precision import precision_of
from megatron_muon.orthogonalize import bfloat16
from megatron_muon.orthogonalize.bfloat16 import slow_bfloat16
from tests.distributed.test_engine import Given, random
from tests.pool import RankPool

CPU = torch.device("cpu")
AVX512 = {f"avx512_{part}": True for part in ("bw", "vl", "dq")}
PROCESSORS: dict[str, dict[str, Any]] = {
    "avx2": {"architecture": "x86_64", "avx2": True},
    "avx512": {"architecture": "x86_64", **AVX512},
    "avx512_bf16": {"architecture": "x86_64", **AVX512, "avx512_bf16": True},
    "amx": {"architecture": "x86_64", **AVX512, "amx_bf16": True, "amx_tile": True},
    "avx_ne_convert": {"architecture": "x86_64", "avx2": True, "avx_ne_convert": True},
    "arm": {"architecture": "aarch64"},
    "untold": {},
}
FAST, SLOW, TIMED = ("avx512_bf16", "amx"), ("avx2",), ("avx512", "avx_ne_convert", "arm", "untold")


@pytest.fixture(autouse=True)
def not_remembered() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    bfloat16._of_processor.cache_clear()
    bfloat16._timed.cache_clear()


def become(monkeypatch: pytest.MonkeyPatch, processor: str, narrow: float = 1.0, wide: float = 1.0) -> None:
    """Have torch tell of a processor; where it is timed, products take these times."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: PROCESSORS[processor], raising=False)
    seconds = iter((wide, narrow))
    monkeypatch.setattr(bfloat16, "times", lambda *_: [9.0, next(seconds), 9.0])
    forget()


@pytest.mark.parametrize("processor", PROCESSORS)
def test_what_the_processor_says_decides_and_others_are_timed(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, processor, narrow=2.1)
    assert bool(slow_bfloat16(CPU, 64, 64)) == (processor not in FAST)
    become(monkeypatch, processor, narrow=1.9)
    assert bool(slow_bfloat16(CPU, 64, 64)) == (processor in SLOW)
    assert {*FAST, *SLOW, *TIMED} == {*PROCESSORS}


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, "arm", narrow=0.5)
    shapes: list[torch.Size] = []
    real = torch.randn
    monkeypatch.setattr(bfloat16.torch, "randn", lambda *size, **how: shapes.append(size) or real(*size, **how))
    for p, q in ((8, 16), (8, 16), (200, 300), (4096, 11008)):
        monkeypatch.setattr(bfloat16, "times", lambda *_: [1.0])
        assert not slow_bfloat16(CPU, p, q)
    assert shapes == [(128, 128), (200, 300), (256, 512)], "within bounds, and each once"


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
def test_only_what_is_left_to_the_device_is_widened(weights: torch.dtype) -> None:
    def dtypes(**options: Any) -> tuple[torch.dtype, torch.dtype]:
        found = precision_of(MuonConfig(**options), weights, slow_bfloat16=True)
        return found.iteration, found.wire

    own = torch.promote_types(weights, torch.float32)
    assert dtypes() == (torch.float32, own)
    assert dtypes(tp_wire_dtype="bf16") == (torch.float32, torch.bfloat16)
    assert dtypes(ns_dtype="bf16") == (torch.bfloat16, torch.bfloat16)
    assert dtypes(ns_dtype="fp16")[0] == torch.float16
    assert dtypes(fp32_matmul_prec="highest") == (own, own)


@pytest.mark.parametrize("processor,dtype", [("avx2", "fp32"), ("amx", "bf16")])
def test_a_step_is_that_of_the_dtype_by_name(processor: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, processor)
    left, named = (torch.nn.Parameter(random((24, 40), 1, torch.float32)) for _ in range(2))
    left.grad = named.grad = random((24, 40), 2, torch.float32)
    Muon([left], lr=0.1).step()
    Muon([named], lr=0.1, ns_dtype=dtype).step()
    assert torch.equal(left, named)


def mixed() -> tuple[torch.Tensor, torch.Tensor]:
    """The last of the ranks is slow; updates of this rank, left to the device and in float32 by name."""
    group, is_last = dist.group.WORLD, dist.get_rank() == dist.get_world_size() - 1
    with pytest.MonkeyPatch.context() as monkeypatch:
        become(monkeypatch, "avx2" if is_last else "amx")
        found = []
        for options in ({}, {"ns_dtype": "fp32"}):
            given = [Given((36, 24), 0), Given((24, 40), None)]
            params = [each.parameter(group, random(each.shape, 3, torch.float32)) for each in given]
            for each, param in zip(given, params, strict=True):
                param.grad = each.cut(random(each.shape, 4, torch.float32), group)
            optimizer = Muon(params, lr=0.1, tp_group=group, **options)
            optimizer.step()
            found.append(torch.cat([param.detach().flatten() for param in params]))
        forget()
    return found[0], found[1]


def test_one_slow_rank_makes_all_iterate_in_float32(pool: RankPool) -> None:
    for left, named in pool.run(mixed, 3):
        assert torch.equal(left, named)


def settled() -> set[torch.dtype]:
    """Of ranks that are fast, where all ranks of the model have agreed before that one elsewhere is not."""
    group = dist.group.WORLD
    with pytest.MonkeyPatch.context() as monkeypatch:
        become(monkeypatch, "amx")
        given = Given((36, 24), 0)
        param = given.parameter(group, random(given.shape, 3, torch.float32))
        param.grad = given.cut(random(given.shape, 4, torch.float32), group)
        optimizer = Muon([param], lr=0.1, tp_group=group)
        optimizer.engines.settle_bfloat16(True)
        optimizer.step()
        forget()
    return {engine.orthogonalizer.dtype for engine in optimizer.engines}


def test_a_group_keeps_what_the_whole_model_has_agreed_on(pool: RankPool) -> None:
    assert pool.run(settled, 2) == [{torch.float32}] * 2
