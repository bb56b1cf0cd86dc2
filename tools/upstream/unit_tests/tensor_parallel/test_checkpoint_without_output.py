"""Selective recomputation (--recompute-modules layernorm) with and without TransformerEngine."""

import pytest
import torch

from megatron.core.tensor_parallel import random


@pytest.mark.parametrize(
    "has_te,arguments,handles_fp8",
    [(False, (), False), (True, (), True), (True, (None,), False), (True, ("e4m3",), True)],
)
def test_fp8_needs_transformer_engine(monkeypatch, has_te, arguments, handles_fp8):
    monkeypatch.setattr(random, "HAVE_TE", has_te)
    assert random.CheckpointWithoutOutput(*arguments).fp8 is handles_fp8


def test_forward_without_transformer_engine(monkeypatch):
    """FP8GlobalStateManager, which was asked for, does not exist then."""
    monkeypatch.setattr(random, "HAVE_TE", False)
    monkeypatch.delattr(random, "FP8GlobalStateManager", raising=False)
    monkeypatch.setattr(random, "_get_all_rng_states", lambda: ())
    inputs = torch.ones(3, requires_grad=True)
    outputs = random.CheckpointWithoutOutput().checkpoint(lambda x: x * 2, inputs)
    assert torch.equal(outputs, torch.full((3,), 2.0))
