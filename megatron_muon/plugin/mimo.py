"""MIMO's optimizer: one of each model in it, with process groups of their own, that are saved as one.

Each model comes through the factory, so that all else is as for a model alone.
"""

from __future__ import annotations

from typing import Any

from megatron_muon._patching import Original, Patches
from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.record import RECORD, note

PATCHES = Patches()

_MODULE = "megatron.core.models.mimo.optimizer"


@PATCHES.around(
    f"{_MODULE}:_iter_optimizer_sub_dicts",
    "it looks for the param groups of a chain's optimizers, which one form for all does not have",
)
def _without_canonical(original: Original, module_sd: Any, optimizer: Any) -> Any:
    return () if _is_canonical(module_sd) else original(module_sd, optimizer)


def _is_canonical(state: Any) -> bool:
    """Whether the state of one of the models is in the form of :mod:`megatron_muon.checkpoint.saving`."""
    from megatron_muon.checkpoint.request import Request  # imports Megatron-Core, which install() must not
    from megatron_muon.checkpoint.saving import WEIGHTS

    return isinstance(state, Request) or WEIGHTS in state


@PATCHES.around(
    f"{_MODULE}:MimoOptimizer.sharded_state_dict",
    "state has the names of the model's weights, and plain data is stored by the first rank alone, which may "
    "have no part of a model",
)
def _with_one_note(original: Original, self: Any, model_state: Any, is_loading: bool = False, **kwargs: Any) -> Any:
    if is_loading:
        return original(self, model_state, is_loading, **kwargs)
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase
    from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding

    found: dict[str, Any] = {}

    def save() -> tuple[list[Any], dict[str, Any]]:
        found.update(original(self, model_state, **kwargs))
        ours = {name: part for name, part in found.items() if RECORD in part}
        for name, part in ours.items():
            replace_prefix_for_sharding(part, f"mimo.{name}.", "")
        notes = [part.pop(RECORD) for part in ours.values()]
        others = {name: part for name, part in found.items() if part and name not in ours}
        return notes, {
            name: extract_matching_values(part, lambda value: not isinstance(value, ShardedBase))[0]
            for name, part in others.items()
        }

    # MIMO's optimizer is of all ranks of the run: it agrees on each step over them.
    gathered = Ranks.of_world().gather(save)
    for name, plain in (each for _, others in gathered for each in others.items()):
        found[name] = found[name] or plain  # a rank without this model stores its steps all the same
    keys = {key for part, _ in gathered for each in part for key in each["keys"]}
    return {**found, RECORD: note(keys)} if keys else found
