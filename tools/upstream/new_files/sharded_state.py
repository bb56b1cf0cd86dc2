"""The protocol of a torch optimizer that gives its checkpoint state itself.

Megatron's wrappers otherwise build the state from ``state_dict()``: by param ids, in the form of
the wrapper, for state tensors of the parameter's shape. An optimizer with other state, or with one
form for all wrappers and layouts, implements :class:`HasShardedState`.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from megatron.core.dist_checkpointing.mapping import ShardedStateDict


@runtime_checkable
class HasShardedState(Protocol):
    """What the wrappers ask for in place of ``state_dict()`` and ``load_state_dict()``.

    ``main_params`` are the parameters that the optimizer updates, by the model's: float32 copies of
    16-bit ones, or the same object.
    """

    def sharded_state(
        self,
        model_sharded_state_dict: ShardedStateDict,
        main_params: Mapping[torch.nn.Parameter, torch.Tensor],
        is_loading: bool,
    ) -> ShardedStateDict:
        """State and main params of the weights that this rank updates, with their replica ids."""

    def load_sharded_state(
        self,
        state_dict: dict[str, Any],
        main_params: Mapping[torch.nn.Parameter, torch.Tensor],
    ) -> None:
        """Take what was loaded into :meth:`sharded_state`."""


def gives_sharded_state(optimizer: Any) -> bool:
    """Whether the torch optimizer inside of a wrapper has the protocol."""
    return isinstance(getattr(optimizer, "optimizer", None), HasShardedState)
