"""What Megatron logs of a step: the norm of the weights, over parts of which each is on one rank.

``--log-params-norm`` sums what a rank holds over the ranks of the model, and over data-parallel ranks what is marked as
shared out among them. Megatron-Core marks what its distributed optimizer has for bfloat16 models. A layer-wise run
shares out float32 weights, too: others' may be stale there, as they are gathered in the next forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_muon._patching import Original, Patches
from megatron_muon.plugin.optimizer_state import leaves, param_states

PATCHES = Patches()

_SPAN = "megatron_muon_span"
"""Attribute of a float32 weight: [start, stop) of its elements that this rank updates."""


def mark_parts(optimizer: Any, model_chunks: Sequence[torch.nn.Module]) -> None:
    """Say of each weight which part this rank updates, if the optimizer shares them out among data-parallel ranks.

    Masters of owners count then as those in slices do, and nothing of others' weights.
    """
    if not any(owned for _, owned in leaves(optimizer)):
        return
    held = {each.param: each for each in param_states(optimizer)}
    for param in (param for chunk in model_chunks for param in chunk.parameters() if param.requires_grad):
        its = held.get(param)
        if param.dtype == torch.float32:
            whole = (0, param.numel() if its is not None else 0)
            setattr(param, _SPAN, whole if its is None or its.slices is None else its.slices.mine)
        else:
            vars(param).update(main_param=None if its is None else its.master, main_param_sharded=True)


@PATCHES.around(
    "megatron.training.utils.common_utils:_get_param_data",
    "others' float32 weights would count as they were before the step, where they are gathered in the next "
    "forward pass",
)
def _with_spans(original: Original, param: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, bool]:
    span = getattr(param, _SPAN, None)
    if span is None:
        return original(param, *args, **kwargs)
    start, stop = span
    return (param.data.view(-1)[start:stop] if stop > start else None), True
