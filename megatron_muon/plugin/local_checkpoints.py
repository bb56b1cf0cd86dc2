"""Local checkpoints (``--non-persistent-ckpt-type local``): each rank reads what it saved itself, or all stop."""

from __future__ import annotations

import functools
from typing import Any

from megatron_muon._patching import Original, Patches
from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.stored import Stored, has_record
from megatron_muon.plugin.canonical_state import Either
from megatron_muon.plugin.checkpointing import Together, answered, requests_in
from megatron_muon.plugin.early_gather import settle
from megatron_muon.plugin.optimizer_config import is_ours

PATCHES = Patches()


@PATCHES.around(
    "megatron.core.dist_checkpointing.tensor_aware_state_dict:MCoreTensorAwareStateDict.to_state_dict",
    "what a local checkpoint has is known here; it has no folder that all ranks could look at",
)
def _with_resolution(
    original: Original, self: Any, sharded_state_dict: Any, algo: str = "atomic", *args: Any, **kwargs: Any
) -> Any:
    from megatron_muon.checkpoint import local

    def choose(either: Either) -> None:
        if has_record(self.common):
            raise CheckpointError(f"{local.name_of(self)} is of Muon, and --optimizer is not: {local.WAY_OUT}")
        either.fail()

    def read(stored: Stored, together: Together) -> Any:
        def check() -> None:
            for _, request in requests:
                local.check_parts(request.ranks, sharded_state_dict, self, algo == "fully_parallel")

        together(check)
        return original(self, sharded_state_dict, algo, *args, **kwargs)

    requests = requests_in(sharded_state_dict, choose)
    if not requests:
        return original(self, sharded_state_dict, algo, *args, **kwargs)
    settle()
    return answered(sharded_state_dict, requests, functools.partial(local.contents, self), read)


@PATCHES.around(
    "megatron.training.checkpointing:_load_non_persistent_base_checkpoint",
    "each rank reads a file of its own: where one cannot, the others would wait for it in what follows",
)
def _with_agreement(
    original: Original, folder: Any, args: Any, rank0: bool, state: Any, iteration: int, *rest: Any, **kwargs: Any
) -> Any:
    def load() -> Any:
        return original(folder, args, rank0, state, iteration, *rest, **kwargs)

    if args.non_persistent_ckpt_type != "local" or not is_ours(getattr(args, "optimizer", None)):
        return load()

    def read() -> Any:
        try:
            return load()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"The local checkpoint of iteration {iteration} cannot be read ({type(error).__name__}: {error}). "
                "Leave out --non-persistent-ckpt-type, or remove the local checkpoints: the newest persistent one "
                "(--load) is taken then."
            ) from error

    # Of the model: whoever fails here is met in the next exchange of those who go on.
    asking = [request.ranks for _, request in requests_in(state, lambda either: None)]
    return (asking or [Ranks.of_world()])[0].together(read)
