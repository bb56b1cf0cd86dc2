"""Megatron-Core's flags for numbers of fewer bits, which it has for Adam alone, taken as what means the same for Muon.

``--use-precision-aware-optimizer`` keeps of a master weight what its bfloat16 weight lacks, and moments in the types
that are asked for. What none of Muon's options means is refused (:mod:`megatron_muon.refusals.megatron`). Adam's own
weights have float32 copies and moments.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron_muon.choices import dtype_name
from megatron_muon.config import flag
from megatron_muon.plugin import options

_DTYPES = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def take(settings: Any) -> bool:
    """Set Muon's options to what Megatron-Core's flags ask for.

    Args:
        settings: parsed arguments, or an ``OptimizerConfig``, for one of this package's optimizers.

    Returns:
        whether they ask for anything.
    """
    if not getattr(settings, "use_precision_aware_optimizer", False):
        return False
    taken = {}
    if settings.bf16 and getattr(settings, "store_param_remainders", True):
        taken["master"] = "remainder"
    if dtype_name(settings.exp_avg_dtype) == "bf16" and settings.muon_momentum_dtype in ("auto", "bf16"):
        taken["momentum_dtype"] = "bf16"
    for name, value in taken.items():
        setattr(settings, f"muon_{name}", value)
    _say_once(" ".join(f"{flag(name)} {value}" for name, value in taken.items()) or "float32 masters and momentum")
    return True


def clear(config: Any) -> Any:
    """Set what has been taken to Megatron-Core's defaults: it would refuse it, or look for it in Adam.

    Returns:
        the type of gradients that was asked for, which DDP's config decides.
    """
    import torch

    asked = config.main_grads_dtype
    config.use_precision_aware_optimizer = False
    for name in (*_DTYPES, "main_grads_dtype"):
        setattr(config, name, torch.float32)
    return asked


@functools.cache
def _say_once(taken: str) -> None:
    options.say(
        f"--use-precision-aware-optimizer is taken as {taken}; Adam's own weights keep float32 copies and moments, and "
        "gradients are of the type in which they are reduced."
    )
