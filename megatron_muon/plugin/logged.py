"""What Megatron logs of a step: the norm of the weights, over parts of which each is on one rank.

``--log-params-norm`` sums what a rank holds over the ranks of the model, and over data-parallel ranks what is marked as
shared out among them. Megatron-Core marks what its distributed optimizer has for bfloat16 models. A layer-wise run
shares out float32 weights, too: others' may be stale there, as they are gathered in the next forward pass. Masters
that are kept as remainders count as the float32 copies do that others have.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_muon._patching import Original, Patches
from megatron_muon.optimizers.sleeping import refuse_reading
from megatron_muon.optimizers.storage import master_of, read
from megatron_muon.plugin.optimizer_state import leaves, param_states

PATCHES = Patches()

_SPAN = "megatron_muon_span"
"""Attribute of a float32 weight: [start, stop) of its elements that this rank updates."""

_UPDATED_BY = WeakTensorKeyDictionary()
"""bfloat16 weights that an optimizer updates itself, without float32 copies -> a weak reference to it."""

_INNERS = WeakTensorKeyDictionary()
"""Weights of a model -> the weak set of all its torch optimizers on this rank, whichever of them updates which."""


def mark_parts(optimizer: Any, model_chunks: Sequence[torch.nn.Module]) -> None:
    """Say of each weight which part this rank updates, if the optimizer shares them out among data-parallel ranks.

    Masters of owners count then as those in slices do, and nothing of others' weights.
    """
    held = {each.param: each for each in param_states(optimizer)}
    inners = weakref.WeakSet(leaf.optimizer for leaf, _ in leaves(optimizer))
    trained = [param for chunk in model_chunks for param in chunk.parameters() if param.requires_grad]
    for param in trained:
        _INNERS[param] = inners
        its = held.get(param)
        if its is not None and its.key is param and param.dtype != torch.float32:
            _UPDATED_BY[param] = weakref.ref(its.inner)
        else:
            _UPDATED_BY.pop(param, None)
    if not any(owned for _, owned in leaves(optimizer)):
        return
    for param in trained:
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
def _with_spans(
    original: Original, param: torch.Tensor, force_create_fp32_copy: bool, bf16: bool
) -> tuple[torch.Tensor | None, bool]:
    if bf16 and not force_create_fp32_copy:
        for each in _INNERS.get(param, ()):  # whoever updates it: all ranks refuse alike, which would wait for the sum
            refuse_reading(each)
    span = getattr(param, _SPAN, None)
    if span is not None:
        start, stop = span
        return (param.data.view(-1)[start:stop] if stop > start else None), True
    inner = _UPDATED_BY.get(param, lambda: None)()
    if inner is None or force_create_fp32_copy:
        return original(param, force_create_fp32_copy, bf16)
    # Its norm in its place, which is all that it is for: float32 numbers of one weight at a time.
    master = read(master_of(param, inner.state.get(param, {}))).float()
    return torch.linalg.vector_norm(master).reshape(1), getattr(param, "main_param_sharded", False)
