"""What is refused before anything is built: one table, walked by command line, configs made in code, plan and docs.

``rule`` says what a refusal is; the rows are data, one file a subject: ``options`` (this package's options with each
other), ``megatron`` (with Megatron's), ``transfer``, ``qk_clip``, ``cpu`` and ``plan``. What a single flag takes, and
which optimizers read it, stands beside the flag (:mod:`megatron_muon.config`). Refusals that need the model or process
groups are where these are looked at.
"""

from megatron_muon.refusals.megatron import MEGATRON
from megatron_muon.refusals.options import OPTIONS
from megatron_muon.refusals.qk_clip import QK_CLIP, UNMEASURED
from megatron_muon.refusals.rule import Chosen, Refusal, Settings, refuse
from megatron_muon.refusals.transfer import TRANSFER

__all__ = ["MUON", "OPTIONS", "QK_CLIP", "TRANSFER", "UNMEASURED", "Chosen", "Refusal", "Settings", "refuse"]

MUON: tuple[Refusal, ...] = (*OPTIONS, *TRANSFER, *MEGATRON)
"""Of runs with one of this package's optimizers."""
