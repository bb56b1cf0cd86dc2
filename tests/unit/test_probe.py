"""Numbers of measured steps, beside those of an SVD."""

from __future__ import annotations

import torch

from megatron_muon import Muon
from megatron_muon.monitor.schema import STATS
from megatron_muon.optimizers.probe import Probe


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
