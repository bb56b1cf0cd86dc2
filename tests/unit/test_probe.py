"""Numbers of measured steps, beside those of an SVD."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.engine.slices import Slices
from megatron_muon.monitor.schema import STATS
from megatron_muon.optimizers.graph import capture
from megatron_muon.optimizers.lanczos import noise, signs
from megatron_muon.optimizers.matrices import Matrices, Update
from megatron_muon.optimizers.probe import Probe
from megatron_muon.optimizers.quadrature import largest, quadratures
from megatron_muon.optimizers.spectra import tridiagonals
from tests.recorded import recorded
from tests.unit.test_captured_step import built, same, train


def weight(*shape: int) -> torch.nn.Parameter:
    param = torch.nn.Parameter(0.02 * torch.randn(shape))
    param.grad = torch.randn(shape)
    return param


def test_a_measured_step() -> None:
    torch.manual_seed(0)
    param = weight(64, 96)
    before = param.detach().clone()
    optimizer = Muon([param], lr=0.1, weight_decay=0.0, scale_mode="none", ns_dtype="fp32")
    optimizer.probe = Probe(is_due=True)
    optimizer.step()
    assert not optimizer.probe.is_due
    (sample,) = optimizer.probe.take()
    assert sample.param is param and not sample.block and sample.numbers.shape == (1, len(STATS))
    found = dict(zip(STATS, sample.numbers[0].tolist(), strict=True))
    s = torch.linalg.svdvals((before - param.detach()).double() / 0.1)
    for name, wanted in (
        ("defect", (s - 1).square().mean().sqrt()),
        ("largest_singular", s[0]),
        ("spectral_norm", torch.linalg.matrix_norm(before.double(), 2)),
        ("weight_rms", before.square().mean().sqrt()),
        ("update_rms", (before - param.detach()).square().mean().sqrt()),
    ):
        assert abs(found[name] / float(wanted) - 1) < 0.01, (name, found[name], wanted)
    assert not optimizer.probe.take()


def zoo(large: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and matrices."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def with_values(values: torch.Tensor, columns: int) -> torch.Tensor:
        left, right = (torch.linalg.qr(random(size, len(values)))[0] for size in (len(values), columns))
        return left * values @ right.T

    if large:
        yield "square 2048", random(2048, 2048) / 2048**0.5
        yield "power law 2048", with_values(torch.arange(1, 2049).float() ** -0.5, 2048)
        return
    for m, n in (
        (1, 1),
        (1, 50),
        (50, 1),
        (2, 2),
        (2, 9),
        (3, 40),
        (13, 13),
        (64, 64),
        (65, 65),
        (300, 90),
        (200, 800),
    ):
        yield f"{m} x {n}", random(m, n) / max(m, n) ** 0.5
    p = 256
    for power in (0.25, 1.0, 2.0):
        yield f"power law {power}", with_values(torch.arange(1, p + 1).float() ** -power, 300)
    yield "low rank and noise", random(p, 8) @ random(8, p) / p + 0.05 * random(p, p) / p**0.5
    yield "one direction", random(p, 1) @ random(1, p) / p * 20 + random(p, p) / p**0.5
    yield "orthogonal", torch.linalg.qr(random(p, p))[0]
    yield "a third left at 0", with_values((torch.arange(p) % 3 > 0).float(), p)
    yield "a tenth below 1/2", with_values(torch.where(torch.arange(p) % 10 == 0, 0.2, 0.95), p)
    yield "orthogonal but for one", with_values(torch.where(torch.arange(p) == 5, 0.1, 1.0), p)
    yield "spread", with_values(torch.linspace(0.0, 1.2, p), p)
    yield "equal rows", torch.ones(40, 70) / 50
    yield "zeros", torch.zeros(100, 120)


def check(name: str, matrix: torch.Tensor) -> None:
    """Within 5 %, or three standard deviations of the estimate where few of many directions make up a number."""
    update = Update([], Slices((), ()), *matrix.shape, False, 0, matrix[None], None)
    tensors = [[matrix[None]] * 2]
    [pairs] = tridiagonals(Matrices([update], lambda tensor: tensor), tensors, [signs, noise])
    (a, b), (c, d) = ((alphas.double(), betas.double()) for alphas, betas, *_ in pairs)
    top = float(largest(c, d)[0].max().clamp_min(0).sqrt())
    below, square = (float(x.mean()) for x in quadratures(a, b))
    s = torch.linalg.svdvals(matrix.double())
    share, f, number = float((s < 0.5).double().mean()), (s - 1).square(), a.size(1) * len(s)
    is_random = len(s) > 64
    assert number >= 4096 if is_random else a.size(1) == len(s)
    assert abs(top - float(s[0])) <= 0.02 * float(s[0]), (name, top, s[0])
    deviation = is_random * (2 * share * (1 - share) / number) ** 0.5
    # Quadrature takes some of what lies next to 1/2 for what is on the other side.
    near = float((abs(s - 0.5) < 0.1).double().mean())
    assert abs(below - share) <= 0.002 + 3 * deviation + near / 2, (name, below, share)
    # So does it with the square root next to 0: 1 % of the square, where the spectrum reaches down to it.
    error = 0.03 + 3 * is_random * float((2 * f.square().mean() / number).sqrt() / f.mean().clamp_min(1e-9))
    assert abs(square - float(f.mean())) <= error * float(f.mean()) + 1e-6, (name, square, f.mean())


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_singular_values_of_a_zoo(large: bool) -> None:
    for name, matrix in zoo(large):
        check(name, matrix)


def test_what_is_not_finite_is_not_hidden() -> None:
    broken, param = weight(70, 80), weight(70, 80)
    assert broken.grad is not None and param.grad is not None
    broken.grad[3, 4], param.grad[:] = torch.nan, 0.0
    optimizer = Muon([broken, param])
    optimizer.probe = Probe(is_due=True)
    optimizer.step()
    found = [dict(zip(STATS, each.numbers[0].tolist(), strict=True)) for each in optimizer.probe.take()]
    bad, zero = (next(its for its in found if its["nonfinite"] == number) for number in (1.0, 0.0))
    assert all(
        math.isnan(bad[name]) for name in ("defect", "unlifted", "largest_singular", "stable_rank", "update_rms")
    )
    assert bad["zero_gradient"] == 0 and zero["zero_gradient"] == 1 and zero["at_bound"] == 1
    assert zero["unlifted"] == pytest.approx(1) and zero["update_rms"] == 0 and math.isnan(zero["stable_rank"])


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_numbers_of_any_size(scale: float) -> None:
    """Squares of gradients this large or small have no place in float32."""
    param = weight(70, 80)
    assert param.grad is not None
    param.grad *= scale
    optimizer = Muon([param], momentum=0.0, nesterov=False)
    optimizer.probe = Probe(is_due=True)
    optimizer.step()
    found = dict(zip(STATS, optimizer.probe.take()[0].numbers[0].tolist(), strict=True))
    s = torch.linalg.svdvals(param.grad.double())
    assert found["gradient_norm"] == pytest.approx(float(s.norm()), rel=1e-3)
    assert found["stable_rank"] == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=0.05)


def test_a_captured_step_is_measured_anew() -> None:
    """With a probe's steps among them, replays leave what they leave without."""
    captured, anew = built("damped"), built("damped")
    replays: list[int] = []
    graph = capture(captured, 1, how=recorded(replays))
    capture(anew, 99, how=recorded())
    captured.probe = Probe()
    for step in range(8):
        captured.probe.is_next_due, captured.probe.is_due = step in (1, 4), step in (2, 5)
        train(captured, 1)
        train(anew, 1)
        assert bool(captured.probe.take()) == (step in (2, 5))
    assert graph.is_captured and len(replays) == 8 - 1 - 4 and same(captured, anew)
