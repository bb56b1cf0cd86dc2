"""The hook on ``get_megatron_optimizer``: what becomes of an optimizer of any name, step by step."""

from __future__ import annotations

import inspect
from typing import Any

from megatron_muon._patching import Original, Patches
from megatron_muon.config import flag
from megatron_muon.plugin import options
from megatron_muon.plugin.canonical_state import keep_canonical
from megatron_muon.plugin.factory import among_own_ranks
from megatron_muon.plugin.groups import ranks_of
from megatron_muon.plugin.holding import entered, observed
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.optimizer_state import has_parts
from megatron_muon.plugin.qk_clip import build

PATCHES = Patches()


@PATCHES.around(
    "megatron.core.optimizer:get_megatron_optimizer",
    "groups are agreed on among the model's ranks, state is saved in one form, weights are clipped inside the "
    "step, the report ends with what holds, and --muon-dry-run ends the run",
)
def _with_steps(original: Original, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    config, chunks, groups = given["config"], given["model_chunks"], given.get("pg_collection")
    with entered(), among_own_ranks(groups):
        optimizer = original(*args, **kwargs)
    if not has_parts(optimizer):
        keep_canonical(optimizer, config, chunks, groups)
        build(optimizer, config, chunks, groups)
        if is_ours(config.optimizer) and ranks_of(groups).is_first:
            print(f"hooks, as observed: {'; '.join(observed(config, chunks, optimizer))}\n", flush=True)
    if is_ours(config.optimizer) and options.of(config).dry_run:
        ranks_of(groups).together(lambda: None)  # none leaves while others are building
        options.say(f"{flag('dry_run')}: all is built and could be trained; nothing is.")
        raise SystemExit(0)
    return optimizer
