"""One optimizer for all weights of a model: matrices by Muon, the rest by AdamW."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.errors import ConfigError, told_in_python
from megatron_muon.optimizers.groups import name_of
from megatron_muon.optimizers.loading import in_order
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.registry import variant_of
from megatron_muon.optimizers.stages import Variant
from megatron_muon.orthogonalize.kernels.elementwise import Rate
from megatron_muon.routing import _is_nonlinear_or_embedding, annotate, global_names, layout_of, report
from megatron_muon.routing.blocks import is_dtensor
from megatron_muon.routing.partition import param_groups
from megatron_muon.routing.told import Layouts

_OF_ADAMW = ("lr", "betas", "eps", "weight_decay", "foreach", "fused", "capturable")
"""Arguments of AdamW that ``optimizer_for`` takes: Muon does not have the others, such as ``maximize``."""

_OF_ROUTING = (
    *("split_qkv", "qkv", "mla_up", "mla_down", "glu", "gdn_in_proj", "mamba_in_proj"),
    *("router", "lora_a", "param_rule", "unknown_2d"),
)
"""Fields of :class:`MuonConfig` that say which weights are matrices, and which ones."""


@told_in_python()
def optimizer_for(
    model: torch.nn.Module,
    lr: Rate = 1e-3,
    *,
    weight_decay: float = 0.1,
    adam: Mapping[str, Any] | None = None,
    variant: str | Variant = "none",
    layouts: Layouts | None = None,
    **options: Any,
) -> JointOptimizer:
    """One optimizer for all trained weights of a model: matrices by :class:`megatron_muon.Muon`, the rest by AdamW.

    ::

        optimizer = megatron_muon.optimizer_for(model, lr=3e-4)
        print(optimizer.table)  # who updates what

    Updates of matrices have the size of Adam's (``scale_mode="moonlight"``, unless another is given, or a variant other
    than those with second moments), so that learning rate and weight decay of an AdamW run are where to start. Biases,
    norms and other vectors do not decay.

    Args:
        model: any ``torch.nn.Module``, on its device and with its final dtype. Tags and layouts are written on its
            weights. It is not kept alive.
        lr: learning rate of the matrices, and of the rest unless ``adam`` has another.
        weight_decay: likewise; decoupled, as in AdamW.
        adam: arguments of ``torch.optim.AdamW`` for the rest: ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``foreach``, ``fused``, ``capturable``. Rows of fused weights that are no matrices have the first four, too.
        variant: as of :class:`megatron_muon.Muon`.
        layouts: what fused weights of your own are, as of :func:`megatron_muon.param_groups`.
        **options: of :class:`megatron_muon.Muon` (``momentum=0.9``, ``num_ns_steps=7``), and those that say which
            weights are matrices (``param_rule=("lm_head.weight=adam",)``, ``router="adam"``), see
            :func:`megatron_muon.param_groups`.

    Raises:
        ConfigError: for a wrong value; for a weight that nobody knows; if no weight is Muon's.
        TypeError: for an option that there is not.
    """
    if adam is not None and not isinstance(adam, Mapping):
        raise TypeError(f"optimizer_for(adam={adam!r}): give arguments of AdamW, such as adam={{'lr': 3e-4}}.")
    given: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, **(adam or {})}
    if unknown := [name for name in given if name not in _OF_ADAMW]:
        raise TypeError(f"optimizer_for(adam=...) with {unknown[0]}: give some of {', '.join(_OF_ADAMW)}.")
    if of_adam := [name for name in _OF_ADAMW if name in options and name != "eps"]:  # Muon has one, too
        raise TypeError(f"optimizer_for({of_adam[0]}=...): it is AdamW's; give adam={{{of_adam[0]!r}: ...}}.")
    if of_rows := [name for name in options if name.startswith("scalar_")]:
        raise TypeError(f"optimizer_for({of_rows[0]}=...): what AdamW has is for rows, too; give adam={{...}}.")
    routing = MuonConfig(**{name: options.pop(name) for name in _OF_ROUTING if name in options})
    groups = param_groups(model, routing, weight_decay=weight_decay, layouts=layouts)
    if not groups.muon:
        raise ConfigError(
            f"optimizer_for a model of which no trained weight is Muon's:\n{groups.table}\nUse torch.optim.AdamW, or "
            "mend the rules that say so (param_rule=)."
        )
    its = variant_of(variant)
    if "options" not in options and (its.name == "muon" or its.optimizer == "adaptive_muon"):
        options = {"scale_mode": "moonlight", **options}
    if any(layout_of(param).has_scalar_rows for group in groups.muon for param in group["params"]):
        options = {**_of_rows(given, lr, weight_decay), **options}
    muon = Muon(groups.muon, lr=lr, weight_decay=weight_decay, variant=its, **options)
    rest = groups.scalar or [{"params": [], "param_names": []}]  # weights may be added
    rest = [{**group, "weight_decay": given["weight_decay"] if group.get("weight_decay") else 0.0} for group in rest]
    return JointOptimizer(model, muon, torch.optim.AdamW(rest, **given), routing=routing, layouts=layouts)


def _of_rows(adam: Mapping[str, Any], lr: Rate, weight_decay: float) -> dict[str, Any]:
    """AdamW's numbers for rows within Muon's weights, whose rates are multiples of Muon's."""
    decay = adam["weight_decay"]
    if decay and not weight_decay:
        raise ConfigError(
            f"optimizer_for(weight_decay=0.0, adam={{'weight_decay': {decay}}}) and a fused weight of which some rows "
            "are Adam's: their decay is a multiple of Muon's. Give Muon one (1e-12 is none), or Adam none."
        )
    options = {
        "scalar_lr_mult": 1.0 if adam["lr"] is lr else float(adam["lr"]) / float(lr),
        "scalar_wd_mult": decay / weight_decay if weight_decay else 1.0,
    }
    return options | {f"scalar_{name}": adam[name] for name in ("betas", "eps") if name in adam}


class JointOptimizer(torch.optim.Optimizer):
    """Two optimizers that together update each trained weight of a model once, as one ``torch.optim.Optimizer``.

    :func:`optimizer_for` makes one. By hand it may have another second optimizer than AdamW::

        groups = megatron_muon.param_groups(model)
        both = JointOptimizer(model, Muon(groups.muon, lr=2e-2), bitsandbytes.optim.AdamW8bit(groups.scalar, lr=3e-4))

    ``param_groups`` are those of the two, in this order, the very dictionaries: rates that a schedule writes there are
    theirs. So is ``state``. State dictionaries have the form of torch's, with numbers for all weights in the order of
    the groups.

    Attributes:
        muon: updates the matrices.
        scalar: updates the rest.

    Args:
        model: weights that it trains, and that neither optimizer has, stop a step. It is not kept alive; copies of the
            optimizer (``copy.deepcopy``, pickle) do not know it, and do not look.
        muon: of the groups ``param_groups(model).muon``.
        scalar: of the groups ``param_groups(model).scalar``.
        routing: options by which weights that are added are given to one of both; None: the defaults.
        layouts: of fused weights that are added, as of :func:`megatron_muon.param_groups`.

    Raises:
        ConfigError: for trained weights of the model that neither optimizer has, or both.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        muon: Muon,
        scalar: torch.optim.Optimizer,
        *,
        routing: MuonConfig | None = None,
        layouts: Layouts | None = None,
    ) -> None:
        self.muon, self.scalar = muon, scalar
        self._routing, self._layouts = routing or MuonConfig(), layouts
        self._model: Callable[[], torch.nn.Module | None] = weakref.ref(model)
        self._frozen: list[tuple[str, torch.nn.Parameter]] | None = None
        self._is_made = self._is_sharded = False
        super().__init__([*muon.param_groups, *scalar.param_groups], dict(muon.defaults))
        self._is_made = True
        self._look_at_model()
        self._frozen = None  # once more in the first step: models are changed after their optimizers were made

    @property
    def table(self) -> str:
        """Who updates which weight, as which matrices, as text; empty for a copy, which does not know the model."""
        model = self._model()
        if model is None:
            return ""
        own = {name: getattr(self._routing, name) for name in _OF_ROUTING}
        options = dataclasses.replace(self.muon.config, **own)
        trained = [(name, param) for name, param in global_names(model) if param.requires_grad]
        routes = report.collect(trained, options, hidden_size=self.muon.hidden_size)
        return report.told_in_python(routes, options)

    @property
    def parts(self) -> tuple[Muon, torch.optim.Optimizer]:
        """Muon and the other."""
        return self.muon, self.scalar

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[torch.Tensor, Any]:
        """What is kept of each weight, in the state of its optimizer."""
        return _State(self.parts)

    @state.setter
    def state(self, value: Mapping[torch.Tensor, Any]) -> None:
        for part in self.parts if self._is_made else ():
            own = {param for group in part.param_groups for param in group["params"]}
            part.state.clear()
            part.state.update({param: state for param, state in value.items() if param in own})

    def _owners(self) -> list[int]:
        """For each param group, which of :attr:`parts` has it.

        Raises:
            ConfigError: if somebody has put other groups in their place.
        """
        its = {id(group): number for number, part in enumerate(self.parts) for group in part.param_groups}
        owners = [its.pop(id(group), None) for group in self.param_groups]
        if its or None in owners:
            raise ConfigError(
                "param_groups of optimizer_for are not those of its two optimizers: change entries of the groups, and "
                "add weights by add_param_group(). Lists and dictionaries of one's own would not be read."
            )
        return [owner for owner in owners if owner is not None]

    @told_in_python()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights of the model, which may have been frozen: matrices to Muon, the others to the other optimizer.

        One group becomes up to three: vectors do not decay, unless the group has a decay of its own.

        Raises:
            ConfigError: for a weight that is not the model's, and from both optimizers.
        """
        if not self._is_made:
            self.param_groups.append(param_group)
            return
        model = self._model()
        if model is None:
            raise ConfigError(
                "add_param_group of an optimizer whose model is gone, or of a copy: which weights are matrices depends "
                "on the model. Make it anew by optimizer_for(model)."
            )
        annotate(model, self._routing, layouts=self._layouts)
        names: dict[torch.Tensor, str] = {param: name for name, param in global_names(model)}
        given = param_group["params"]
        params = (
            [given]
            if isinstance(given, torch.Tensor)
            else [each[-1] if isinstance(each, tuple) else each for each in given]
        )
        if foreign := sum(param not in names for param in params):
            raise ConfigError(f"add_param_group with {foreign} weights that are not the model's: give it the model's.")
        kinds = {param: _kind(param, names[param]) for param in params}
        decay = {} if "weight_decay" in param_group else {"weight_decay": 0.0}
        for kind, (part, own) in {
            "muon": (self.muon, {}),
            "table": (self.scalar, {}),
            "vector": (self.scalar, decay),
        }.items():
            if some := [param for param in params if kinds[param] == kind]:
                part.add_param_group(
                    {**param_group, "params": some, "param_names": [names[each] for each in some], **own}
                )
                self.param_groups.append(part.param_groups[-1])
        self._frozen = None

    @torch._disable_dynamo  # type: ignore[attr-defined]  # see Muon.step
    @told_in_python()
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient.

        Args:
            closure: as in ``torch.optim.Optimizer``; called once.

        Raises:
            ConfigError: before anything moves, if a weight of the model is trained and neither optimizer has it.
            Exception: from both optimizers; Muon, the first, raises before anything moves what it knows beforehand.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._owners()
        if self._frozen and (late := [name for name, param in self._frozen if param.grad is not None]):
            raise ConfigError(
                f"{_some(late)}: frozen when the optimizer was made, and trained now. add_param_group() has it updated;"
                " or freeze it, and set its grad to None."
            )
        # FSDP2 puts whole weights in the place of its own at times, after an evaluation: look at those once.
        if self._frozen is None or not self._is_sharded:
            self._look_at_model()
        for group in self.scalar.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.layout != torch.strided:  # AdamW would stop after Muon's part
                    raise ConfigError(
                        f"{name_of(group, index)}: its gradient is sparse, which AdamW does not take. Make the "
                        "embedding with sparse=False."
                    )
        for part in self.parts:
            part.step()
        return loss

    def _look_at_model(self) -> None:
        """Compare what is updated with what the model trains: weights may have been replaced since it was made.

        Raises:
            ConfigError: naming weights that nobody would update, or both optimizers.
        """
        model = self._model()
        if model is None:
            self._frozen = []
            return
        counts: dict[torch.Tensor, int] = {}
        for param in (param for group in self.param_groups for param in group["params"]):
            counts[param] = counts.get(param, 0) + 1
        named = [(name, param) for name, param in model.named_parameters() if counts.get(param, 0) != 1]
        if wrong := [name for name, param in named if param.requires_grad or param in counts]:
            raise ConfigError(
                f"{_some(wrong)}: trained by the model, and not in exactly one of the two optimizers. Weights that "
                "have been replaced (resized embeddings, adapters, wrappers) need an optimizer that is made afterwards."
            )
        if self._frozen is None:
            self._is_sharded = any(map(is_dtensor, counts))
        self._frozen = [(name, param) for name, param in named if not param.requires_grad]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``, with all bits of Muon's state.

        Raises:
            ValueError: for the state of an optimizer of other groups.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        owners, groups = self._owners(), state_dict["param_groups"]
        lengths = [[len(group["params"]) for group in its] for its in (self.param_groups, groups)]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"state of param groups of {lengths[1]} weights for an optimizer with groups of {lengths[0]}: it is of "
                "another model, other rules, or another optimizer."
            )
        groups = in_order(self.param_groups, state_dict)["param_groups"]
        for number, part in enumerate(self.parts):
            own = [group for group, owner in zip(groups, owners, strict=True) if owner == number]
            ids = set(itertools.chain.from_iterable(group["params"] for group in own))
            its = {key: value for key, value in state_dict["state"].items() if key in ids}
            part.load_state_dict({"state": its, "param_groups": own})
        self._join(owners)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _join(self, owners: Sequence[int]) -> None:
        """Have the groups of both, which may be other dictionaries now, in the order of before."""
        left = [iter(part.param_groups) for part in self.parts]
        self.param_groups = [next(left[owner]) for owner in owners]

    def __getstate__(self) -> dict[str, Any]:
        return {"muon": self.muon, "scalar": self.scalar, "owners": self._owners()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        owners = state.pop("owners")
        self._routing, self._layouts = MuonConfig(), None
        self._model, self._frozen, self._is_sharded, self._is_made = _no_model, [], True, True
        super().__setstate__({**state, "defaults": dict(state["muon"].defaults), "param_groups": []})
        self._join(owners)


def _no_model() -> None:
    """What stands for the model of a copy."""


def _kind(param: torch.Tensor, name: str) -> str:
    """Which group it belongs to, as :func:`megatron_muon.param_groups` decides."""
    if not _is_nonlinear_or_embedding(param):
        return "muon"
    return "table" if param.dim() > 1 and not name.endswith("bias") else "vector"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class _State(MutableMapping[torch.Tensor, Any]):
    """The states of several optimizers, as one: of each weight in that which has it."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = parts

    def _of(self, param: torch.Tensor) -> Any:
        for part in self._parts:
            if param in part.state or any(param is its for group in part.param_groups for its in group["params"]):
                return part.state
        raise KeyError(param)

    def __getitem__(self, param: torch.Tensor) -> Any:
        return self._of(param)[param]  # made where it is missing, as in torch

    def __setitem__(self, param: torch.Tensor, state: Any) -> None:
        self._of(param)[param] = state

    def __delitem__(self, param: torch.Tensor) -> None:
        del self._of(param)[param]

    def __contains__(self, param: object) -> bool:
        return any(param in part.state for part in self._parts)

    def get(self, param: torch.Tensor, default: Any = None) -> Any:
        """Makes nothing."""
        return self[param] if self.__contains__(param) else default

    def __iter__(self) -> Iterator[torch.Tensor]:
        return itertools.chain.from_iterable([*part.state] for part in self._parts)

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)

    def __repr__(self) -> str:
        return repr(dict(self))
