"""Muon: momentum, orthogonalized by Newton-Schulz (Jordan et al., https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_muon.agree import Ranks
from megatron_muon.config import PREFIX, UNREAD, MuonConfig
from megatron_muon.engine.modes import BLOCKWISE
from megatron_muon.engine.planner import check_weight
from megatron_muon.engine.step import StepEngine
from megatron_muon.errors import ConfigError, in_python, sizes, told_in_python
from megatron_muon.optimizers import sleeping
from megatron_muon.optimizers.auto_steps import look, measure
from megatron_muon.optimizers.engines import Engines
from megatron_muon.optimizers.fading import PEAK
from megatron_muon.optimizers.groups import (
    AUTO,
    MEANT,
    OF_TORCHS,
    OPTIONAL,
    PER_GROUP,
    check_layout,
    check_marks,
    check_names,
    check_numbers,
    check_weights,
    is_number,
    name_of,
    no_matrix,
)
from megatron_muon.optimizers.handled import STEP, TensorVersions, refuse_capture, refuse_elsewhere
from megatron_muon.optimizers.loading import AsItIs, check_state, in_order, tell
from megatron_muon.optimizers.power import WarmStarts
from megatron_muon.optimizers.precision import own_dtype
from megatron_muon.optimizers.probe import Probe
from megatron_muon.optimizers.rates import check_decay
from megatron_muon.optimizers.registry import foreign_moments, made_anew, variant_of
from megatron_muon.optimizers.scalar_rows import SECOND_MOMENT, check_scalar_rows, cut_second_moment
from megatron_muon.optimizers.shard_layout import ShardLayout
from megatron_muon.optimizers.stages import Variant, init_rows
from megatron_muon.optimizers.step import Graph, Step
from megatron_muon.optimizers.storage import MOMENTUM, REMAINDER, TIES, having_gradients, settle
from megatron_muon.optimizers.windows import OFFLOADED, Windows
from megatron_muon.options import MuonOptions, UpdateKnobs
from megatron_muon.orthogonalize.kernels.elementwise import Rate
from megatron_muon.orthogonalize.scale import MOONLIGHT_HIDDEN
from megatron_muon.orthogonalize.switches import matmul_precision
from megatron_muon.refusals import MUON, refuse
from megatron_muon.refusals.rule import flag_of
from megatron_muon.routing.beside import Beside, beside
from megatron_muon.routing.blocks import no_numbers_of_its_own
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, MSIGN, WHOLE, MatrixLayout, layout_of

_ATTRIBUTES = "attributes of weights"
"""Key in the state of a copy (:meth:`Muon.__getstate__`): what the weights carry, such as their layout."""

_OF_ONE = ("step", "finals", "graph", "is_complete", "probe", "starts", "versions", "windows", "_masters", "_beside")
"""Attributes that are not copied: copies have new ones, and schedulers of torch set ``step``."""


_NOT_OURS = "differentiable"
"""What torch adds to the defaults of an optimizer that is copied or loaded, and no group of a new one has."""

_ACCEPTED = 32
"""How many sets of options of param groups, other than the optimizer's, are right: schedules change them."""

_SERVED: weakref.WeakValueDictionary[int, Muon] = weakref.WeakValueDictionary()
"""The optimizer of each variant, by the variant's identity."""


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights, whole or divided by tensor parallelism.

    For each logical matrix W of m rows and n columns, with gradient G::

        M <- momentum * M + (1 - momentum) * G
        U  = momentum * M + (1 - momentum) * G   if nesterov else   M
        W <- (1 - lr * weight_decay) * W - lr * extra_scale_factor * scale(m, n) * NewtonSchulz(U)

    A ``variant`` changes U before the iteration or the result after it (:mod:`megatron_muon.optimizers.stages`).

    A parameter may hold several logical matrices, and rows that follow the scalar optimizer's rule (attribute
    ``matrix_layout``, see :mod:`megatron_muon.routing`); it may be a 3-D stack of such weights, and one rank's shard
    (Megatron's ``tensor_model_parallel``, ``partition_dim``, ``expert_tp``). The update is that of the whole logical
    matrices except in ``tp_mode="blockwise"``, and in the steps between those that ``blockwise_period`` counts off,
    where each shard counts as a weight of its own.

    State: ``momentum_buffer``, of the parameter's shape, in the form of ``momentum_dtype``, and what remains of its
    master weight with ``master="remainder"`` (:mod:`megatron_muon.optimizers.storage`); ``momentum_peak``, a number for
    each of its rows (:mod:`megatron_muon.optimizers.fading`); ``step``, the count of its own updates; for parameters
    with rows under Adam's rule ``exp_avg_sq`` of these rows. Between steps it may be moved, replaced, zeroed or taken
    away, by name or as a whole: nothing else is kept of it that would not be noticed to be out of date.

    Attributes:
        directions: the kinds of updates that it has, see :class:`megatron_muon.routing.layout.MatrixLayout`.
        engines: plan and carry out its steps, see :class:`megatron_muon.optimizers.engines.Engines`.
        finals: called one after another, in each step once for each parameter, with those that are as the step leaves
            them: when their last matrix is written, or at the end of the step.
        graph: its step as a CUDA graph, see :func:`megatron_muon.optimizers.graph.capture`; None: each step is taken
            anew.
        probe: measures the steps that it is told to, see :class:`megatron_muon.optimizers.probe.Probe`; None: nothing
            is measured.
        windows: through which state comes that lives on the host; None: none does.
        is_complete: whether others rely on its weights being all that it will have.

    Args:
        params: 2-D parameters (3-D with a stacked layout) or param groups.
        lr: learning rate; a tensor of one element on a GPU is not read by the host in a step. At rate 0 no bit of a
            weight changes.
        momentum: decay of the momentum, 0 <= momentum < 1.
        nesterov: whether to use Nesterov momentum.
        weight_decay: weight decay; decoupled, it is multiplied by ``lr`` alone. A tensor as ``lr`` may be one.
        variant: what differs from plain Muon: a name of :data:`megatron_muon.optimizers.registry.VARIANTS`, or an
            object: ``"normuon"``, ``NorMuon(beta2=0.9)``.
        options: all other options; None: their defaults.
        tp_group: tensor-parallel group of dense weights; None if nothing is divided.
        expert_tp_group: that of weights with ``expert_tp = True``.
        **overrides: options by name, such as ``scale_mode="moonlight"``; they count before those in ``options``.

    Raises:
        ValueError: for a wrong value (:class:`megatron_muon.ConfigError`), a parameter that is not 2-D, or a fused
            weight whose shards ``tp_mode`` cannot split.
        TypeError: for an option that there is not.
    """

    @told_in_python()
    def __init__(
        self,
        params: ParamsT,
        lr: Rate = 1e-3,
        *,
        momentum: float = MuonConfig.momentum,
        nesterov: bool = MuonConfig.nesterov,
        weight_decay: Rate = 0.01,
        variant: str | Variant = "none",
        options: MuonOptions | None = None,
        tp_group: dist.ProcessGroup | None = None,
        expert_tp_group: dist.ProcessGroup | None = None,
        **overrides: Any,
    ) -> None:
        options = _with(MuonOptions() if options is None else options, overrides)
        self.variant = variant_of(variant)
        served = _SERVED.get(id(self.variant))
        if served is not None and served.variant is self.variant:
            self.variant = made_anew(self.variant)
        own = {name: getattr(options, name) for name in PER_GROUP}
        defaults = {"lr": lr, STEP: 0, "momentum": momentum, "weight_decay": weight_decay, **own}
        check_numbers(defaults)
        knobs = {field.name: getattr(options, field.name) for field in fields(UpdateKnobs)}
        its = {name: value for name, value in self.variant.settings.items() if name.startswith(PREFIX)}
        knobs |= {name.removeprefix(PREFIX): value for name, value in its.items()}
        self.config = MuonConfig(momentum=momentum, nesterov=nesterov, **knobs)
        self.refuse_options({})
        if options.scale_mode == MOONLIGHT_HIDDEN and not (is_number(options.hidden_size) and options.hidden_size >= 1):
            raise ConfigError(
                f"scale_mode {MOONLIGHT_HIDDEN} with hidden_size {options.hidden_size}: give the model's hidden size, "
                "or use scale_mode moonlight."
            )
        self.hidden_size = options.hidden_size
        self.engines = Engines(self.config, tp_group, expert_tp_group, damped=options.damping_depth > 0.0)
        self.directions = self.variant.directions
        self.watched = (SECOND_MOMENT, *self.variant.watched)
        self.starts = WarmStarts()
        self.first_lrs: list[Rate] = []
        of_all = {name for cls in (Muon, MuonOptions, type(self.variant)) for name in inspect.signature(cls).parameters}
        self._of_all = frozenset(of_all - {"params", *defaults, *OPTIONAL})
        self._accepted: deque[dict[str, Any]] = deque(maxlen=_ACCEPTED)  # the last is the first
        self._start()
        super().__init__(params, defaults)
        _SERVED[id(self.variant)] = self

    def _start(self) -> None:
        """Create what belongs to this object alone, and is not copied."""
        self.finals: list[Callable[[list[torch.Tensor]], None]] = []
        self.graph: Graph | None = None
        self.is_complete = False
        self.probe: Probe | None = None
        self._beside: Beside | None = None  # of what param_groups has left to another optimizer
        self.versions = TensorVersions()
        self._masters = WeakTensorKeyDictionary()  # weights that had a remainder; their state may be taken away
        names = OFFLOADED.get(self.config.offload)
        self.windows = None if names is None else Windows(names, self.config.chunk_mb)

    @property
    def checkpoint_rule(self) -> str:
        """The name that checkpoints have for the update rule."""
        return self.variant.name

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """Options that checkpoints record, beside the numbers of param groups, so that changes can be detected."""
        names = ["nesterov", "coefficient_type", "num_ns_steps"]
        names += ["scale_mode", "extra_scale_factor"] if self.variant.scales else []
        names += ["weight_decay_method"] if self.variant.decays else []
        own = {name: getattr(self.config, name) for name in names}
        if (period := self.config.blockwise_period) > 1:
            own["blockwise_lr_mult"] = self.config.blockwise_lr_mult
        every = "every step" if self.config.tp_mode == BLOCKWISE else "no step"
        own["blockwise"] = f"all but every {period}. step" if period > 1 else every
        return {"newton_schulz_eps": self.config.eps, **own, **self.variant.checkpoint_options}

    @told_in_python()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``; refuses what cannot be orthogonalized, and leaves nothing of it behind.

        A group may have options of its own, but none that is the whole optimizer's: see
        :mod:`megatron_muon.optimizers.groups`.

        Raises:
            ConfigError: for an option that a group cannot have, for a wrong value, and if the optimizer is complete.
        """
        if self.is_complete:
            raise ConfigError(
                "add_param_group of an optimizer that get_megatron_optimizer has built: Megatron-Core's lists, and "
                "other ranks, know the weights that it was built with. Build it anew with all of them."
            )
        given = dict(param_group)
        super().add_param_group(param_group)
        try:
            if (dtensors := _dtensors()) is not None:
                dtensors.check(self, param_group)
            with self._on_shards():
                self._check_group(given, param_group)
        except Exception:
            self.param_groups.pop()
            param_group.clear()
            param_group.update(given)
            raise
        self._beside = self._beside or beside(param_group["params"])
        lr = param_group["lr"]
        self.first_lrs.append(lr.clone() if isinstance(lr, torch.Tensor) else lr)

    def _check_group(self, given: dict[str, Any], group: dict[str, Any]) -> None:
        """Refuse a param group: as it was given, and with the entries that it lacked."""
        check_names(given, self.defaults, self._of_all)
        self._check_values(group)
        for index, param in enumerate(group["params"]):
            try:
                self._check_weight(param)
            except ValueError as error:
                names = "param_names" in group
                raise ConfigError(f"{name_of(group, index)}: {error}" if names else str(error)) from error

    def _check_weight(self, param: torch.Tensor) -> None:
        """Refuse a weight that cannot be orthogonalized."""
        if problem := no_numbers_of_its_own(param):
            raise ConfigError(f"a weight of {sizes(param.shape)} is {problem}: give it to another optimizer.")
        layout = layout_of(param)
        if param.dim() != layout.dims:
            raise ConfigError(f"a weight {no_matrix(param, layout.dims)}")
        check_layout(self, param, layout)
        if self.config.master == "remainder" and param.dtype == torch.float16:
            raise ConfigError(
                f"master remainder with a weight of {sizes(param.shape)} in float16, of which float32 has more "
                "than 16 bits beside it: use bfloat16 weights, or float32 copies (master fp32)."
            )
        self.config.iteration(layout.budget)  # a layout made by hand may name what there is not
        weight = self.engines.weight(param)
        check_weight(weight, self.config.tp_mode, self.config.blockwise_period)
        check_scalar_rows(weight)

    def _check_values(self, group: dict[str, Any], *, read: bool = True) -> None:
        """Refuse values of a param group; see :func:`megatron_muon.optimizers.groups.check_numbers`."""
        check_numbers(group, read=read)
        check_names(self._of_all.intersection(group), (), self._of_all)  # of a group that was edited
        check_marks(group)
        if group["damping_depth"] and not self.defaults["damping_depth"]:
            raise ConfigError(
                f"damping_depth {group['damping_depth']} in a param group of an optimizer without: give the "
                "constructor one, too."
            )
        own = {name: group[name] for name in (*OPTIONAL, "momentum", "scalar_optimizer") if name in group}
        if own not in self._accepted and any(value != getattr(self.config, name) for name, value in own.items()):
            self.refuse_options(own)
            self._accepted.appendleft(own)

    def refuse_step(self, device: torch.device | None = None) -> None:
        """Refuse a step that could not be done to its end; param groups may have been edited since they were added.

        Args:
            device: see :func:`megatron_muon.optimizers.handled.refuse_elsewhere`.

        Raises:
            ConfigError: naming what is wrong and the way out.
        """
        if torch.is_inference_mode_enabled():
            raise ConfigError(
                "step() within torch.inference_mode(), which leaves state that no later step may change: "
                "use torch.no_grad(), or neither."
            )
        if self.probe is not None and self.engines.divisions.groups:
            shards = [shard for shard in map(self.engines.shard, self._own) if shard is not None and shard.is_grid]
            if shards:
                raise ConfigError(
                    f"a probe with {len(shards)} DTensors of which ranks divide both rows and columns: their vectors "
                    "cannot be added up. Set the optimizer's probe to None."
                )
        for group, first_lr in zip(self.param_groups, self.first_lrs, strict=True):
            self._check_values(group, read=False)
            check_decay(group, self.config, self.variant.decays, first_lr)
            check_weights(group)
        refuse_elsewhere(self, device)

    def refuse_options(self, options: dict[str, Any]) -> None:
        """Refuse wrong values of a param group's own options, and what does not go with the optimizer's.

        Raises:
            ConfigError: naming option, value and way out.
        """
        try:
            config = replace(self.config, **options).validate(pairs=False)
            settings = {**config.as_settings(), **self.variant.settings}
            del settings[f"{PREFIX}param_rule"]  # said by the layouts of weights
            refuse((*UNREAD, *MUON), settings)
            self.variant.check(config)
        except ConfigError as error:  # flags have been looked at before: these are a call's
            message = str(error)
            for option, setting in self.variant.flags.items():
                message = message.replace(f"{flag_of(setting)} ", f"{type(self.variant).__name__}'s {option} ")
            raise ConfigError(in_python(message)) from None

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy`` and pickle: everything but what belongs to this object alone, such as hooks.

        Raises:
            ConfigError: if its state is asleep in a file.
        """
        sleeping.refuse_reading(self)
        own = {name: value for name, value in vars(self).items() if name not in _OF_ONE}
        state = {name: value for name, value in own.items() if not name.startswith("_optimizer_")}
        plain = (bool, int, float, str, tuple, MatrixLayout)
        attributes = [
            {name: value for name, value in vars(param).items() if isinstance(value, plain)} for param in self._own
        ]
        return {**state, _ATTRIBUTES: attributes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``; groups of older checkpoints get the entries that they lack, second moments
        of the weight's shape are cut down.

        A copy's weights get the attributes that ``copy.deepcopy`` of a parameter leaves behind: layout and division.
        """
        attributes = state.pop(_ATTRIBUTES, None)
        super().__setstate__(state)
        on_host = OFFLOADED.get(self.config.offload, ())
        for param, each in self.state.items():
            for name, value in each.items() if isinstance(each, dict) else ():
                if isinstance(value, AsItIs):
                    each[name] = value.of(param, name, on_host)
        self.starts = WarmStarts()
        self.variant.forget()
        if attributes is not None:
            self._start()
            for param, given in zip(self._own, attributes, strict=True):
                vars(param).update(given | vars(param))
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != _NOT_OURS:
                    group.setdefault(key, value)
        with self._on_shards():
            for param, each in self.state.items():
                cut_second_moment(param, each)
                each.pop("update_left_vector", None)  # of scale mode spectral_norm, in older versions

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``, with all bits of the state: the dtype of a weight is not that of its state.

        Momentum in another dtype than this optimizer's is converted; without ``master_remainder`` masters are the
        weights as they are; a second moment that the variant needs and the state lacks begins at zero, and one that is
        another variant's is left out. Each is told by a line. Where the saved groups and these have names, state goes
        to the weight of its name.

        Raises:
            ValueError: before anything changes, for the state of other weights, or of an optimizer that is no Muon.
        """
        for saved in state_dict["param_groups"]:
            check_marks(saved)
        state_dict = in_order(self.param_groups, state_dict)
        check_state(self.param_groups, state_dict)
        last = self.register_load_state_dict_pre_hook(AsItIs.hook)  # after those of others
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        others: Counter[str] = Counter()
        for group in self.param_groups:
            if foreign := sorted(name for name in group if name in self._of_all or name in MEANT or name in OF_TORCHS):
                for name in foreign:
                    del group[name]
                others[f"had {', '.join(foreign)} in their param group, which groups of Muon do not have"] += len(
                    group["params"]
                )
        with self._on_shards():
            for param in self._own:
                if MOMENTUM in (state := self.state.get(param, {})):
                    others[settle(param, state, self.config.master, self.config.momentum_dtype, self._masters)] += 1
                    others[self.variant.missing(state)] += 1
                    for name in foreign_moments(self.variant, state):
                        del state[name]
                        others[f"had {name} of another variant, which {self.variant.name} leaves out"] += 1
                if self.windows is not None:
                    self.windows.settle(param, state)
        del others[""]
        tell(others)

    def forget(self) -> None:
        """Discard all that was derived from the weights, which have been replaced: they are their masters, too."""
        self._forget_found()
        for state in self.state.values():
            for name in (REMAINDER, TIES):
                if name in state:
                    state[name].zero_()

    def _forget_found(self) -> None:
        self.starts = WarmStarts()
        self.variant.forget()
        for state in self.state.values():
            for name in self.variant.watched:
                if name in state:
                    state[name].zero_()

    def reset(self) -> None:
        """Start anew from the weights as they are: the next step is the first one of a fresh optimizer.

        Momentum, second moments, vectors, radii, the count of steps and numbers of Newton-Schulz steps that were
        measured are gone; weights, learning rates and all other options of the groups stay.
        """
        parts = (REMAINDER, TIES)  # of the weights as they are
        states = {param: {name: state[name] for name in parts if name in state} for param, state in self.state.items()}
        self.state.clear()
        self.state.update({param: state for param, state in states.items() if state})
        if self.windows is not None:
            self.windows.forget()
        for group in self.param_groups:
            group[STEP] = 0
            group.pop(AUTO, None)
        self._forget_found()

    def streaming(self) -> AbstractContextManager[None]:
        """Within, state that lives on the host comes to the device when it is opened."""
        if self.windows is None or not self._own:
            return nullcontext()
        return self.windows.step(self._own[0].device)

    def sleep(self, to: str | os.PathLike[str] = sleeping.HOST) -> int:
        """Free the device of all state, see :func:`megatron_muon.sleep`."""
        return sleeping.sleep(self, to)

    def wake(self) -> int:
        """Bring state back, see :func:`megatron_muon.wake`."""
        return sleeping.wake(self)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable imports dynamo at once
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; one without (None) stays as it is, its momentum too.

        Args:
            closure: as in ``torch.optim.Optimizer``.

        Raises:
            ConfigError: before anything changes, for numbers, options, weights and gradients that cannot be worked
                with, a weight decay that would turn weights, and state on another device than its weight.
            RuntimeError: on all ranks of a group that divides weights, before anything changes, if one of them has a
                gradient on some ranks and none on others, or if their parameters, options or kernels differ.
            Exception: whatever is raised once something has changed has a note that says so.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        words = nullcontext() if self.is_complete else told_in_python()  # of flags, if it was built from flags
        with words, self._on_shards(), matmul_precision(self.config.fp32_matmul_prec):
            if self.graph is None:
                refuse_capture(self)
            if not self.engines.compared_elsewhere and look(self):
                measure([self], Ranks(tuple(group for group in self.engines.groups.values() if group.size() > 1)))
            if self.graph is None:
                Step(self).run()
            else:
                self.graph.step()
        if self._beside is not None and not self._beside.look():
            self._beside = None
        return loss

    def _on_shards(self) -> AbstractContextManager[None]:
        """Within, its weights and their state are plain tensors, of DTensors this rank's parts."""
        dtensors = _dtensors()
        return nullcontext() if dtensors is None else dtensors.on_shards(self)

    @property
    def sends(self) -> bool:
        """Whether its next step sends messages to data-parallel ranks, see :meth:`Engines.shared`.

        Nothing is final there before all of them have been sent: gathers that a final weight sets off are of the same
        groups, whose ranks must come to everything in one order.
        """
        shared = self.engines.shared(self._own)
        return shared is not None and shared.shares

    @property
    def steps_in_blocks(self) -> bool:
        """Whether its next step orthogonalizes each shard by itself: all but every P-th one, as its groups count them.

        Of groups that have stepped less often than others, as weights without gradients, the others' count is taken:
        it is what checkpoints have for all. Where data-parallel ranks orthogonalize for one another, no weight is cut.
        """
        count: int = max((group[STEP] for group in self.param_groups), default=0)
        return self.engines.sharing is None and (count + 1) % self.config.blockwise_period > 0

    @property
    def _own(self) -> list[torch.Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def prepare(self) -> StepEngine | None:
        """Plan the step for all parameters, without communication; the step makes up for it if this is not called.

        Returns:
            the engine, which has the plan, of steps with whole matrices if there are others; None if this rank has no
            parameters to orthogonalize.
        """
        with nullcontext() if self.is_complete else told_in_python(), self._on_shards():
            for in_blocks in (True, False) if self.config.blockwise_period > 1 else (False,):
                engines = self.engines.in_step(self._own, self._own, self.directions, in_blocks=in_blocks)
        return next((engine for (direction, _), engine in engines.items() if direction == MSIGN), None)

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        """Create missing state. Megatron-Core calls this with False before it loads a checkpoint."""
        others: Counter[str] = Counter()
        for param in having_gradients(group["params"]) if skip_non_grad_params else group["params"]:
            state = self.state[param]
            if told := settle(param, state, self.config.master, self.config.momentum_dtype, self._masters):
                others[told] += 1
            layout = getattr(param, LAYOUT_ATTRIBUTE, WHOLE)  # no call for each weight in each step
            has_second = layout.has_scalar_rows and group["scalar_optimizer"] == "adam"
            if has_second and SECOND_MOMENT not in state:
                wide = own_dtype(param.dtype)
                empty = param.new_zeros((), dtype=wide).expand_as(param)
                is_whole = not layout.has_matrices or isinstance(layout, ShardLayout)
                state[SECOND_MOMENT] = torch.zeros_like(param, dtype=wide) if is_whole else empty
                state[STEP] = 0
            if has_second:  # state of older checkpoints: as many as the group has made
                state.setdefault(STEP, group[STEP])
                cut_second_moment(param, state)
            if (PEAK not in state or STEP not in state) and layout.has_matrices:
                init_rows(param, state, PEAK)
                state.setdefault(STEP, 0)  # not the group's, which may differ between ranks that share the weight
            if layout.direction == MSIGN:
                self.variant.init_state(param, state)
            if self.windows is not None:
                self.windows.settle(param, state)
        tell(others)


def _dtensors() -> ModuleType | None:
    """:mod:`megatron_muon.optimizers.dtensors`; None where there cannot be any: torch needs seconds to import them."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from megatron_muon.optimizers import dtensors

    return dtensors


def _with(options: MuonOptions, overrides: dict[str, Any]) -> MuonOptions:
    """Options with some of them replaced.

    Raises:
        TypeError: for one that there is not, naming those that may be meant; for options of another class.
    """
    if not isinstance(options, MuonOptions):
        raise TypeError(f"options {options!r}: give a MuonOptions, or options by name, as in Muon(params, eps=1e-7).")
    names = [field.name for field in fields(MuonOptions)]
    for name in overrides.keys() - names:
        known = [*names, "momentum", "nesterov", "weight_decay", "variant"]
        near = [MEANT[name]] if name in MEANT else difflib.get_close_matches(name, known, 1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise TypeError(f"Muon has no option {name} ({meant}). What a variant alone has is given to its class.")
    return replace(options, **overrides)
