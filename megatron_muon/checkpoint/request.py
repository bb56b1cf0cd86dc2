"""Load the state of Megatron-Core's optimizers in the space of the model's weights.

It takes three steps, as Megatron-Core's interface does: a :class:`Request` in place of the optimizer's state, which
does not know yet what the checkpoint has; :meth:`Request.resolve` with the checkpoint's folder; :meth:`Request.fill`
with what was read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import CheckpointError, raise_together
from megatron_muon.checkpoint.param_state import MASTER, MOMENTUM_DTYPE, Bucket, ParamState, mean_squares
from megatron_muon.checkpoint.record import Rule, numbers_of
from megatron_muon.checkpoint.saving import WEIGHTS, Model, device_of, or_local, replica_of, rule_of, sums_in
from megatron_muon.checkpoint.sharding import Place
from megatron_muon.checkpoint.sources import ESTIMATED, Choice, choose, difference, gradients_to_average
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.checkpoint.weights import compare, sums_of_parts
from megatron_muon.choices import dtype_name
from megatron_muon.optimizers import auto_steps
from megatron_muon.optimizers.fading import PEAK
from megatron_muon.optimizers.groups import AUTO
from megatron_muon.optimizers.handled import STEP
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.storage import MOMENTUM

Change = tuple[torch.nn.Parameter, Rule | None, Rule]
"""A weight, its rule in the checkpoint (None if it was not trained), its rule now."""


class Request(dict[str, Any]):
    """In place of an optimizer's sharded state, until it is known what the checkpoint has.

    What it does, all ranks of the model must do, under :meth:`Ranks.together`.

    Attributes:
        ranks: of the model; of those that read, where only some do.
        members: all of them, by number.
        held: the weights of this rank.
        places: of them.
        accept: whether the checkpoint may have other rules.
        stored: the checkpoint's contents, once resolved.
        choices: of each weight, once resolved.
    """

    def __init__(
        self,
        ranks: Ranks,
        held: Sequence[ParamState],
        model: Model,
        accept: bool,
        buckets_of_adam: Callable[[Stored], Mapping[torch.nn.Parameter, Bucket]],
        way_back: Callable[[Ranks, Stored, list[Change]], str],
    ) -> None:
        """Of state that is all created.

        Args:
            ranks: see above, as others.
            buckets_of_adam: where a run of Adam alone, at this layout, had each weight in its buckets.
            way_back: with which flags a run can go on whose weights have other rules; all ranks call it.
        """
        super().__init__()
        self.ranks = ranks
        self.members: frozenset[int] = frozenset()
        self.held = held
        self._buckets_of_adam, self._way_back = buckets_of_adam, way_back
        self.places = model.places(held)
        self.accept = accept
        self.stored: Stored | None = None
        self.choices: list[list[Choice]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Request:
        """Frameworks copy what is to be loaded; this stands for the optimizer itself."""
        return self

    def resolve(self, stored: Stored) -> None:
        """Decide what to read, and become the state that ``dist_checkpointing.load`` takes.

        Raises:
            CheckpointError: on all ranks, if the checkpoint has not what is needed.
        """
        self.stored = stored = stored.of({name for place in self.places for name in place.members})
        problems: list[str] = []
        changes: dict[str, Change] = {}
        weights: dict[str, Any] = {}
        self.choices = []
        buckets = self._buckets(stored)
        for each, place in zip(self.held, self.places, strict=True):
            self.choices.append([])
            for state in each.states:
                choice = choose(
                    each,
                    place,
                    state,
                    replica_of(each, place),
                    stored,
                    buckets.get(each.param),
                    fresh=self._is_new(each, place),
                    regrouped=self._is_split(each, place),
                )
                if isinstance(choice, str):
                    problems.append(choice)
                    continue
                self.choices[-1].append(choice)
                if choice.is_read:
                    weights.setdefault(place.name, {})[state] = dict(enumerate(choice.parts))
            if each.key is not None and (change := self._change(each, place, self.choices[-1])):
                changes[change[0]] = change[1]
        raise_together(self.ranks, problems, f"{stored.folder} cannot be resumed:", _way_out(stored))
        if not self.accept and any(self.ranks.gather(lambda: bool(changes))):
            way_back = self._way_back(self.ranks, stored, list(changes.values()))
            raise_together(self.ranks, changes, f"{stored.folder} was trained with other rules:", way_back)
        self.clear()
        self[WEIGHTS] = or_local(weights)

    def fill(self, loaded: dict[str, Any]) -> None:
        """Put what ``dist_checkpointing.load`` returned for the optimizer in its place.

        Raises:
            CheckpointError: on all ranks, if a tensor is not what was saved.
        """
        if self.stored is None:
            raise RuntimeError("load the checkpoint with megatron.core.dist_checkpointing.load after install()")
        weights = loaded.get(WEIGHTS, {})
        for each, place, choices in zip(self.held, self.places, self.choices, strict=True):
            for choice in choices:
                if choice.is_read:
                    _take(choice, weights[place.name][choice.state])
                elif choice.state == MASTER:
                    weight = each.param.data.reshape(-1)[slice(*each.span)] if each.span else each.param.data
                    each.saved[choice.state].copy_(weight)
        self._check_contents()
        for each in self.held:
            each.take()
        self._estimate()
        self._set_steps(self.stored.step)
        numbers = self.stored.record.numbers if self.stored.record else ()
        measured = {name: steps for each in numbers for name, steps in each.get(AUTO, ())}
        for inner in {id(each.inner): each.inner for each in self.held}.values():
            if isinstance(inner, Muon):
                auto_steps.take(inner, measured)

    def _estimate(self) -> None:
        """Second moments of weights, or of rows, whose earlier optimizer had none, from their first.

        Rows under Adam in a weight of Muon's have theirs in a tensor that is zero elsewhere.
        """
        assert self.stored is not None
        firsts: list[torch.Tensor | None] = [None] * len(self.held)

        def look() -> bool:
            for number, (each, place, choices) in enumerate(zip(self.held, self.places, self.choices, strict=True)):
                read = {choice.state for choice in choices if choice.is_read}
                before = self._rule_before(place)
                is_whole = before is None or (before.name, before.layout) == (each.rule, rule_of(each).layout)
                if any(choice.state == ESTIMATED for choice in choices) and not (ESTIMATED in read and is_whole):
                    first = next((state for state in ("exp_avg", "momentum_buffer") if state in read), None)
                    if first is None:
                        raise CheckpointError(f"{place.name}: there is no first moment to estimate {ESTIMATED} from")
                    firsts[number] = each.numbers_in(first)
                    if ESTIMATED not in read:
                        each.tensors[ESTIMATED].zero_()
            return any(first is not None for first in firsts)

        if any(self.ranks.gather(look)):
            for each, first, mean in zip(self.held, firsts, mean_squares(self.held, firsts), strict=True):
                if first is not None:
                    second = each.tensors[ESTIMATED]  # zero where there was none
                    estimate = (mean * gradients_to_average(self.stored.momentum)).to(second.dtype)
                    second.copy_(torch.where(second == 0, estimate, second))  # masked_fill_() would wait for the number

    def _buckets(self, stored: Stored) -> Mapping[torch.nn.Parameter, Bucket]:
        """Where the distributed optimizer had each weight: this run's, in a layer-wise one, or that of Adam alone."""
        if not stored.buckets:
            return {}
        own = {each.param: each.bucket for each in self.held if each.bucket is not None}
        return self._buckets_of_adam(stored) or own

    def take_numbers(self, names: Collection[str]) -> None:
        """Give the param groups what the checkpoint has, for ``--use-checkpoint-opt_param-scheduler``.

        Raises:
            CheckpointError: if they belong to another ``--muon-transfer``.
        """
        found = [
            (place.name, each.group, numbers)
            for each, place in zip(self.held, self.places, strict=True)
            if (numbers := self._numbers_before(each, place))
        ]
        raise_together(
            self.ranks,
            [name for name, group, numbers in found if _other_transfer(group, numbers)],
            "--use-checkpoint-opt_param-scheduler: learning rates and weight decay of the checkpoint belong to another "
            "--muon-transfer (or --adam-eps) than this run's:",
            "Take those of the checkpoint, or leave out --use-checkpoint-opt_param-scheduler.",
        )
        for _, group, numbers in found:
            group.update({name: numbers[name] for name in names if name in numbers and name in group})

    def describe(self) -> str:
        """What the checkpoint has brought and what the flags change, in words; all ranks must call this."""
        assert self.stored is not None
        carried: Counter[str] = Counter()
        changed: Counter[tuple[str, str]] = Counter()  # by the rule, and in words
        for each, place, choices in zip(self.held, self.places, self.choices, strict=True):
            for choice in choices:
                if choice.stored_as not in (choice.state, "param") and choice.state != PEAK:
                    carried[f"{choice.state} {choice.origin}"] += 1
                if choice.state == MOMENTUM and choice.is_read:
                    was = self._momentum_before(each, place, choice)
                    if was != each.momentum_dtype:
                        line = f"{each.rule} momentum was {was}, is {each.momentum_dtype} from now on"
                        changed[each.rule, line] += 1
            now = dict(numbers_of(each.numbers))
            changed[each.rule, ""] += 1
            for name, value in self._numbers_before(each, place).items():
                if name in now and now[name] != value and name != MOMENTUM_DTYPE:
                    changed[each.rule, f"{each.rule} {name}: {value} in the checkpoint, {now[name]} now"] += 1
        everywhere = self.ranks.gather(lambda: (carried, changed))
        shards = sum((counts for counts, _ in everywhere), Counter[str]())
        changes = sum((counts for _, counts in everywhere), Counter[tuple[str, str]]())
        lines = [f"megatron_muon: optimizer state of {self.stored.folder}, after {self.stored.step} updates"]
        lines += [f"  {what} ({number} shards)" for what, number in sorted(shards.items())]
        for (rule, line), number in sorted(changes.items()):
            some = f" ({number} of {changes[rule, '']} shards)" if number < changes[rule, ""] else ""
            lines += [f"  changed by flags: {line}{some}"] if line else []
        return "\n".join(lines)

    def _numbers_before(self, held: ParamState, place: Place) -> dict[str, Any]:
        """Of the weight's param group in the checkpoint; empty if it had another rule."""
        record = None if self.stored is None else self.stored.record
        rule = None if record is None else record.rule(place.name)
        if record is None or rule is None or rule.name != held.rule:
            return {}
        return record.numbers[rule.numbers]

    def _momentum_before(self, held: ParamState, place: Place, choice: Choice) -> str:
        """The form of a momentum in the run that saved it, or the numbers in which it is stored."""
        assert self.stored is not None
        stored_as = dtype_name(self.stored.shapes[choice.parts[0].key][1])
        return str(self._numbers_before(held, place).get(MOMENTUM_DTYPE, stored_as))

    def _is_new(self, held: ParamState, place: Place) -> bool:
        """Whether the checkpoint's weight had another rule, so that it may lack what this one's keeps."""
        rule = self._rule_before(place)
        return rule is None or rule.name != held.rule

    def _is_split(self, held: ParamState, place: Place) -> bool:
        """Whether the checkpoint's weight was split into other matrices than this one."""
        rule = self._rule_before(place)
        return rule is not None and rule.layout != rule_of(held).layout

    def _rule_before(self, place: Place) -> Rule | None:
        assert self.stored is not None
        record = self.stored.record
        return None if record is None or record.converted else record.rule(place.name)

    def _change(self, held: ParamState, place: Place, choices: list[Choice]) -> tuple[str, Change] | None:
        """What has changed for a weight, in words; None if nothing that gives its state a meaning."""
        assert self.stored is not None
        now, record = rule_of(held), self.stored.record
        if record is not None and not record.converted:
            before = record.rule(place.name)
            line = difference(place.name, before, now)
        else:
            other = sorted({choice.stored_as or "nothing" for choice in choices if not choice.is_same})
            before = Rule("adam", "", ()) if "exp_avg" in other else Rule("muon", "whole", ())
            line = f"{place.name}: {', '.join(other)} in the checkpoint, {now} now" if other else None
        return None if line is None else (line, (held.param, before, now))

    def _check_contents(self) -> None:
        """Compare what was read with the sums that were taken when it was saved, on the first rank."""
        assert self.stored is not None
        saved = self.stored.record
        if saved is None:
            return
        shares = []
        for each, place, choices in zip(self.held, self.places, self.choices, strict=True):
            states = {choice.state for choice in choices if choice.stored_as == choice.state and self._is_alike(choice)}
            shares += [share for share in sums_in(each, place, saved.version == 1) if share[0][1] in states]
        compare(self.ranks, self.stored.folder, saved, sums_of_parts(shares, device_of(self.held)))

    def _is_alike(self, choice: Choice) -> bool:
        """A state that was rounded when it was read, or has fewer rows (of a padded vocabulary), has another sum."""
        assert self.stored is not None
        return all(
            self.stored.shapes[part.key] == (tuple(part.global_shape), target.dtype)
            for part, target in zip(choice.parts, choice.targets, strict=True)
        )

    def _set_steps(self, step: int) -> None:
        for each in self.held:
            if each.key is None:
                continue
            state = each.inner.state[each.key]
            if _counts_in_state(each.inner):
                on_device = each.group.get("capturable") or each.group.get("fused")  # torch's rule
                state[STEP] = torch.tensor(float(step), device=each.key.device if on_device else "cpu")
            elif STEP in state:  # Muon counts a weight's own, too
                state[STEP] = step
        for inner in {id(each.inner): each.inner for each in self.held}.values():
            for group in inner.param_groups if not _counts_in_state(inner) else ():
                if step and group["params"] and getattr(inner, "capturable", False):  # a graph counts on the device
                    group[STEP] = torch.tensor([step], dtype=torch.int32, device=group["params"][0].device)
                elif step or STEP in inner.defaults:
                    group[STEP] = step
                else:  # fused Adam has none before its first step
                    group.pop(STEP, None)


def _other_transfer(group: Mapping[str, Any], numbers: Mapping[str, Any]) -> bool:
    """Whether Muon's groups were made by ``--muon-transfer``, and by another one or without it."""
    damped = [each.get("damping_depth", 0.0) for each in (group, numbers)]
    changed = damped[0] != damped[1] or group.get("scalar_eps") != numbers.get("scalar_eps", group.get("scalar_eps"))
    return any(damped) and changed


def _counts_in_state(inner: torch.optim.Optimizer) -> bool:
    """torch's Adam counts steps for each weight; all others, and fused ones, in the group."""
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)) and not hasattr(inner, "adam_w_mode")


def _take(choice: Choice, parts: dict[int, torch.Tensor]) -> None:
    """Put what was read into the state, unless it was read there, and leave nothing that was read elsewhere."""
    for number, target in enumerate(choice.targets):
        part = parts[number]
        if (part.data_ptr(), part.device) != (target.data_ptr(), target.device):
            target.copy_(part)
            parts[number] = target


def _way_out(stored: Stored) -> str:
    if stored.buckets:
        return (
            "It has Adam's state in the form of the distributed optimizer's buckets, which are read only at the "
            "tensor and pipeline parallel sizes that saved them. Use these (--tensor-model-parallel-size, "
            "--pipeline-model-parallel-size), or resume it once with the optimizer and layout that saved it and "
            "--dist-ckpt-optim-fully-reshardable, but without --overlap-grad-reduce (of several buckets Megatron-Core "
            "0.19.2 may save wrong numbers), save, and start from that."
        )
    return "Check that it is of this model (--load), or start with new optimizer state (--no-load-optim)."
