"""What Megatron-Core and torch say at the start of every run and that is of no use on the CPU.

Whoever trains without a GPU has chosen to do without Apex, TransformerEngine and CUDA; that they are missing hides what
a run has to tell. Only these messages are left out, word for word. Errors and all other warnings are shown.
"""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "Only transformer-engine>=1.7.0 supports MoE experts, but your version is 0.0.0",
    "When using async grad allreduce it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
    "MimoModelConfig is experimental",  # imported by Megatron-Core, not used
    "full scope is deprecated",  # of CUDA graphs, and the default of a TransformerConfig made in code
    r"\s*It is recommended to use a ModelConfig",  # the script's business, and true of all that there are
    # Of torch, at what Megatron-Core does to load a checkpoint.
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
    "The argument order of load has been changed",
    "Please use DTensor instead and we are deprecating ShardedTensor",
)
"""How messages of ``warnings`` begin (regular expressions)."""

_STATE_MACHINE = (
    "RerunStateMachine initialized in mode",
    "Setting RerunStateMachine mode",
    "Result validation enabled",
)
_LOGGED = {
    "torch.utils.cpp_extension": ("No CUDA runtime is found",),
    "megatron.core.rerun_state_machine": _STATE_MACHINE,  # told at the start and before and after every evaluation
    "megatron.core.models.gpt.gpt_model": ("GPTModel IS DEPRECATED",),
    # Told of every save, also of one that is not asynchronous; its successor needs a GPU.
    "megatron.core.dist_checkpointing.strategies.torch": ("MCore's async save is deprecated",),
}
"""Logger -> how its messages begin."""


class _Filter(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or not record.getMessage().startswith(self.beginnings)


_FILTERS = {name: _Filter(beginnings) for name, beginnings in _LOGGED.items()}


def hide() -> None:
    """Leave these messages out from now on. Does nothing twice."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, each in _FILTERS.items():
        logging.getLogger(name).addFilter(each)


def show() -> None:
    """Show these messages again: undoes :func:`hide`."""
    kept = [entry for entry in warnings.filters if getattr(entry[1], "pattern", None) not in _WARNINGS]
    warnings.filters[:] = kept  # type: ignore[index]  # a list, whatever its stub says
    for name, each in _FILTERS.items():
        logging.getLogger(name).removeFilter(each)
