"""Steps of Newton-Schulz that are measured: all ranks of a model do it in the same step, those without matrices too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_muon.agree import Ranks
from megatron_muon.choices import AUTO_STEPS
from megatron_muon.optimizers.auto_steps import look, measure
from megatron_muon.optimizers.muon import Muon
from megatron_muon.plugin.environment import agree_on_plans
from megatron_muon.routing.layout import layout_of


class Measuring:
    """Has the optimizers of a model measure before the step in which any of its ranks asks for it.

    All ranks of the model must make one. Attributes:
        is_due: whether the step that comes is to, on any rank.
        is_known_to_all: whether each rank can tell by itself.
    """

    def __init__(self, muons: Sequence[Muon], ranks: Ranks) -> None:
        params = [param for muon in muons for group in muon.param_groups for param in group["params"]]
        asks = any((its := layout_of(param).budget) is not None and its.steps == AUTO_STEPS for param in params)
        found = ranks.gather(lambda: (asks, bool(params)))
        self._ranks, self._muons = ranks, muons if any(asks for asks, _ in found) else ()
        self.is_due: float | bool = False
        self.is_known_to_all = not any(asks for asks, _ in found) or all(counts for _, counts in found)

    def look(self) -> bool:
        """See :func:`megatron_muon.optimizers.auto_steps.look`, for all optimizers of this rank."""
        return any([look(muon) for muon in self._muons])

    def first(self, update: Callable[[], Any]) -> Any:
        """Run the optimizer's ``step_with_ready_grads``, with gradients that have been clipped: those of u."""
        if self.is_due:
            measure(self._muons, self._ranks)
            agree_on_plans(self._muons, self._ranks)
        return update()
