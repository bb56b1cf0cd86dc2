"""Settings of a training run that a plan cannot do with, or without."""

from __future__ import annotations

from megatron_muon.choices import OPTIMIZERS
from megatron_muon.refusals.rule import Refusal, given, other_optimizer

_PLAN = "in a plan"

READ: tuple[Refusal, ...] = (
    Refusal((given("use_checkpoint_args"),), "it reads no checkpoint", "give the flags of the model themselves", _PLAN),
)
"""Of whatever reads the flags of a run without running it."""

PLAN: tuple[Refusal, ...] = (
    Refusal((other_optimizer(*OPTIMIZERS),), "it is that of Muon", "add --optimizer muon", _PLAN),
)
