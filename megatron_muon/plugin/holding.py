"""Which hooks hold, as observed when an optimizer is built: the report ends with it.

A copy of a function from before ``install()`` is found where a module has it by a name. One in a default argument, a
dictionary or a ``functools.partial`` is not: the inner hook, which every path reaches, sees whether the outer one was
entered. (Megatron-Core's old ``get_megatron_muon_optimizer`` and MIMO look the function up at each call.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from megatron_muon._patching import holds, lost
from megatron_muon.config import MuonConfig, flag
from megatron_muon.errors import ConfigError
from megatron_muon.plugin import options
from megatron_muon.plugin.canonical_state import is_canonical
from megatron_muon.plugin.qk_clip import clip_of
from megatron_muon.plugin.within import within

_TRAINING = "megatron.training.training"

_entered: ContextVar[bool] = ContextVar("megatron_muon_entered", default=False)


def entered() -> AbstractContextManager[None]:
    """Within, the factory is reached through the hook on it."""
    return within(_entered, True)


def check_entered() -> None:
    """Refuse an optimizer that is being built past the hooks on ``get_megatron_optimizer``.

    Raises:
        ConfigError: naming what would be missing, and the way out.
    """
    if not _entered.get():
        raise ConfigError(
            "The optimizer is built past megatron_muon's hooks on megatron.core.optimizer.get_megatron_optimizer, by a "
            "copy of it from before install() (in a local variable, a default argument, a dictionary) or by its inner "
            "function: checkpoints would not be canonical, and nothing would be measured or clipped for QK-clip. Call "
            "megatron_muon.install() before what holds the copy is imported, or call "
            "megatron.core.optimizer.get_megatron_optimizer."
        )


def observed(config: Any, chunks: Sequence[Any], optimizer: Any) -> list[str]:
    """What holds of what a run needs, and what others have replaced since."""
    clip = clip_of(chunks)
    canonical = is_canonical(optimizer) and holds("megatron.core.dist_checkpointing.serialization:load") is not False
    found = [
        "checkpoints canonical" if canonical else "WARNING checkpoints in Megatron-Core's own form",
        "QK-clip off" if clip is None else f"QK-clip {'clips' if clip.settings.clip else 'measures'} in the step",
        _log(options.of(config)),
    ]
    if missing := lost():
        found.append(f"WARNING replaced by other code, so that they need not hold: {', '.join(missing)}")
    return found


def _log(asked: MuonConfig) -> str:
    """Whether the training loop tells the recorder: only Megatron-Core's own does."""
    if holds(f"{_TRAINING}:training_log"):
        return f"numbers and losses recorded where {_TRAINING}.train is the loop"
    told = f"the recorder is not called by this training loop: {_TRAINING} is not there"
    if not asked.log_jsonl:
        return told
    what = "has what is told of Muon's steps, and no losses" if asked.watches else "is not written"
    return f"WARNING {flag('log_jsonl')} {asked.log_jsonl} {what}, {told}"
