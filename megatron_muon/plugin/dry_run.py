"""``--muon-dry-run``: a run that ends where training would begin."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron_muon._patching import Patch
from megatron_muon.config import flag
from megatron_muon.plugin import options
from megatron_muon.plugin.groups import ranks_of
from megatron_muon.plugin.optimizer_config import is_ours

__all__ = ["patches"]


def patches() -> list[Patch]:
    """The outermost hook on the factory: what the others say has been said."""
    return [
        Patch(
            "megatron.core.optimizer:get_megatron_optimizer",
            _with_end,
            "--muon-dry-run ends the run when all is built and reported",
        )
    ]


def _with_end(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if is_ours(given["config"].optimizer) and options.of(given["config"]).dry_run:
            ranks_of(given.get("pg_collection")).together(lambda: None)  # none leaves while others are building
            options.say(f"{flag('dry_run')}: all is built and could be trained; nothing is.")
            raise SystemExit(0)
        return optimizer

    return get_megatron_optimizer
