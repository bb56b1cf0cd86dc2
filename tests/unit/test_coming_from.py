"""The table "Coming from" of ``docs/plain-pytorch.md``: the numbers of other Muons, by formulas that are theirs."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megatron_muon import Muon, MuonOptions, optimizer_for
from tests.unit.test_plain_pytorch import PAGE, blocks

SECTION = PAGE.split("\n## Coming from another Muon\n")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| (.*?) \| `(.*?)` \|$", SECTION, re.M)
SHAPES = ((12, 5), (5, 12), (7, 7))
SIMPLE = [(3.4445, -4.7750, 2.0315)] * 5
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], None]
"""Weight, gradient, momentum buffer and learning rate: changes the weight and the buffer."""


def iterate(u: torch.Tensor, coefficients: Sequence[tuple[float, float, float]], norm: torch.Tensor) -> torch.Tensor:
    x = (u.T if u.size(0) > u.size(1) else u) / norm
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.size(0) > u.size(1) else x


def of_torch(adjust: Callable[[int, int], float]) -> Step:
    def step(w: torch.Tensor, g: torch.Tensor, buffer: torch.Tensor, lr: float) -> None:
        buffer.lerp_(g, 1 - 0.95)
        u = g.lerp(buffer, 0.95)
        o = iterate(u, SIMPLE, u.norm().clamp(min=1e-7))
        w.mul_(1 - lr * 0.1).sub_(lr * adjust(*w.shape) * o)

    return step


def of_keller_jordan(w: torch.Tensor, g: torch.Tensor, buffer: torch.Tensor, lr: float) -> None:
    """``nanochat/muon.py`` of 2025 has the same formula."""
    buffer.lerp_(g, 1 - 0.95)
    u = g.lerp(buffer, 0.95)
    w.sub_(lr * max(1, w.size(0) / w.size(1)) ** 0.5 * iterate(u, SIMPLE, u.norm() + 1e-7))


def of_moonlight(w: torch.Tensor, g: torch.Tensor, buffer: torch.Tensor, lr: float) -> None:
    buffer.mul_(0.95).add_(g)
    u = g.add(buffer, alpha=0.95)
    o = iterate(u, SIMPLE, u.norm() + 1e-7)
    w.mul_(1 - lr * 0.1).sub_(lr * 0.2 * math.sqrt(max(w.shape)) * o)


def of_dion(
    polar_express: bool = True,
    adjust: Callable[[int, int], float] = lambda m, n: math.sqrt(m / n),
    cautious: bool = False,
) -> Step:
    def step(w: torch.Tensor, g: torch.Tensor, buffer: torch.Tensor, lr: float) -> None:
        buffer.mul_(0.95).add_(g)
        if polar_express:
            o = iterate(buffer, POLAR_EXPRESS, buffer.norm() * 1.02 + 1e-8)
        else:
            o = iterate(buffer, QUINTIC, buffer.norm() + 1e-8)
        kept = 1 - lr * 0.01 * ((o * w >= 0).to(w.dtype) if cautious else 1)
        w.mul_(kept).sub_(lr * adjust(*w.shape) * o)

    return step


def of_emerging_optimizers(w: torch.Tensor, g: torch.Tensor, buffer: torch.Tensor, lr: float) -> None:
    w.mul_(1 - lr * 0.01)
    buffer.lerp_(g, 1 - 0.95)
    o = iterate(buffer, QUINTIC, buffer.norm().clamp(min=1e-7))
    w.sub_(lr * max(w.shape) ** 0.5 * o)


FORMULAS: list[tuple[str, Step]] = [
    ("torch.optim.Muon", of_torch(lambda m, n: math.sqrt(max(1, m / n)))),
    ("match_rms_adamw", of_torch(lambda m, n: 0.2 * math.sqrt(max(m, n)))),
    ("spectral_unclamped", of_torch(lambda m, n: math.sqrt(m / n))),
    ("KellerJordan", of_keller_jordan),
    ("Moonlight", of_moonlight),
    ("Dion", of_dion()),
    ("use_polar_express=False", of_dion(polar_express=False)),
    ("cautious_wd=True", of_dion(adjust=lambda m, n: 0.2 * math.sqrt(max(m, n)), cautious=True)),
    ("emerging-optimizers", of_emerging_optimizers),
    ("nanochat/muon.py", of_keller_jordan),
]
"""What each row of the table is of, by words in it."""


def arguments(row: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(blocks("Coming from another Muon")[0], names)
    return dict(eval(f"dict({row})", names))


def weights(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in SHAPES]


def ten_steps(
    make: Callable[[list[torch.nn.Parameter]], Any], dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    params = [torch.nn.Parameter(weight) for weight in weights(dtype)]
    optimizer = make(params)
    for step in range(10):
        for param, grad in zip(params, gradients(step, dtype), strict=True):
            param.grad = grad
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("number", range(len(FORMULAS)), ids=[name for name, _ in FORMULAS])
def test_ten_steps_are_the_originals(number: int) -> None:
    (name, step), (original, row) = FORMULAS[number], ROWS[number]
    assert name in original and len(ROWS) == len(FORMULAS)
    mine = ten_steps(lambda params: Muon(params, lr=0.02, fp32_matmul_prec="highest", **arguments(row)))
    theirs, buffers = weights(), [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for index in range(10):
        for weight, grad, buffer in zip(theirs, gradients(index), buffers, strict=True):
            step(weight, grad, buffer, 0.02)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number,adjust", [(0, None), (1, "match_rms_adamw"), (2, "spectral_unclamped")])
def test_torchs_own_class(number: int, adjust: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, but for the bfloat16 of its iteration."""
    module = pytest.importorskip("torch.optim._muon", reason="torch.optim.Muon came with torch 2.9")
    own = "_zeropower_via_newtonschulz"
    source = inspect.getsource(getattr(module, own))
    exec(source.replace("torch.bfloat16", "torch.float64"), names := dict(vars(module)))
    monkeypatch.setattr(module, own, names[own])
    mine = ten_steps(lambda params: Muon(params, lr=0.02, fp32_matmul_prec="highest", **arguments(ROWS[number][1])))
    theirs = ten_steps(lambda params: torch.optim.Muon(params, lr=0.02, adjust_lr_fn=adjust))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_emerging_optimizers_own_class() -> None:
    """In float32, the only numbers that it takes."""
    from emerging_optimizers.orthogonalized_optimizers import Muon as Theirs

    row = next(row for name, row in ROWS if "emerging-optimizers" in name)
    options: dict[str, Any] = {"lr": 0.02, "fp32_matmul_prec": "highest"}
    mine = ten_steps(lambda params: Muon(params, **options, **arguments(row)), torch.float32)
    theirs = ten_steps(lambda params: Theirs(params, **options), torch.float32)
    for one, other in zip(mine, theirs, strict=True):
        # Weights of about 2, and steps of 0.1, each with the rounding of ten products.
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6)


def test_keller_jordans_adamw() -> None:
    """``MuonWithAuxAdam``: the rest of a model, by the arguments that the page has for ``optimizer_for``."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).double()
    (given,) = re.findall(r"KellerJordan's AdamW is\s+`adam=(.*?)`", SECTION, re.S)
    adam = eval(given)
    optimizer = optimizer_for(model, 0.02, adam=adam, fp32_matmul_prec="highest", **arguments(ROWS[3][1]))
    bias = model[0].bias.detach().clone()
    first, second = torch.zeros_like(bias), torch.zeros_like(bias)
    for step in range(1, 11):
        model.zero_grad()
        model(torch.randn(3, 4, dtype=torch.float64)).square().sum().backward()
        grad = model[0].bias.grad.clone()
        first.lerp_(grad, 1 - 0.9)
        second.lerp_(grad.square(), 1 - 0.95)
        bias.sub_(3e-4 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-10))
        optimizer.step()
    torch.testing.assert_close(model[0].bias.detach(), bias, rtol=0, atol=1e-9)


def test_defaults_that_the_rows_leave_out() -> None:
    """The page says that momentum is 0.95; Nesterov is off where a row does not say."""
    optimizer = Muon([torch.nn.Parameter(torch.ones(2, 2))])
    assert optimizer.defaults["momentum"] == 0.95 and not optimizer.config.nesterov
    assert MuonOptions().num_ns_steps == 5
