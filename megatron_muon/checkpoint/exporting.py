"""Checkpoints for Megatron-Core without this package: what its own ``adam`` and ``muon`` read, at every layout.

Megatron-Core looks for tensors by the names of weights, and for param groups by their options, in one list for each
optimizer of a chain. Its wrappers nest the lists differently, and call a master weight by two names: all are written.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_muon.checkpoint.errors import CheckpointError, some
from megatron_muon.checkpoint.keys import ALONE, PREFIX, RECORD_KEY, parse_state, state_key
from megatron_muon.checkpoint.reading import COMMON, Index
from megatron_muon.checkpoint.record import Record, Rule
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.checkpoint.writing import Content, Plan, in_float32
from megatron_muon.optimizers.fading import PEAK

MUON, ADAM = "megatron-muon", "megatron-adam"
TARGETS = (MUON, ADAM)

_MASTERS = ("fp32_param", "param")
"""Of Float16OptimizerWithFloat16Params, and of DistributedOptimizer."""

_SCHEDULED = ("default_config", "is_decoupled_lr", "lr_mult", "max_lr", "min_lr", "wd_mult", "start_wd", "end_wd")
"""Of a param group: what Megatron-Core finds it by, and what the schedule reads."""

_OF_ADAM = {
    "amsgrad": False,
    "bias_correction": True,
    "capturable": False,
    "decoupled_weight_decay": True,
    "differentiable": False,
    "foreach": None,
    "fused": None,
    "maximize": False,
}
"""Of a param group of torch's Adam and of TransformerEngine's and Apex's, each of which ignores the others'."""

_SAME = ("whole", "qkv: q, k, v", "qkv: q, gate, k, v")
"""Layouts that Megatron-Core's Muon has."""


@dataclass(frozen=True)
class _Weight:
    """One of the model's tensors."""

    key: str
    rules: Mapping[tuple[int, ...], Rule]  # of each layer (expert) in it, by its index
    size: tuple[int, ...]
    dtype: torch.dtype
    optimizer: str  # which of Megatron-Core's will have it


def plan(index: Index, stored: Stored, to: str, values: Mapping[str, float]) -> Plan:
    """What to write, and what cannot be; ``values`` of arguments of the run that reads it outweigh the checkpoint's.

    Raises:
        CheckpointError: if the checkpoint does not tell what is needed.
    """
    record = stored.record
    if record is None or not record.weights or len(stored.records) > 1:
        raise CheckpointError(
            f"{stored.folder} does not tell which optimizer has which weight"
            + (" of several models" if record is not None and record.weights else "")
            + ": Megatron-Core reads its own checkpoints as they are; of a converted one give the source, of several "
            "models save each by itself."
        )
    weights = _weights(stored, record, to)
    made = _Tensors(index, stored, weights, to)
    made.write()
    groups = _Groups(stored, record, weights, to, values)
    made.plan.lost += groups.lost
    common = dict(stored.common)
    if common.get("args") is not None:
        common["args"] = copy.copy(common["args"])
        common["args"].optimizer = to.removeprefix("megatron-")
    form = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }
    metadata = {**(common.get("content_metadata") or {}), **form}
    made.plan.common = {**common, "optimizer": groups.optimizers(), "content_metadata": metadata}
    return made.plan


def _weights(stored: Stored, record: Record, to: str) -> list[_Weight]:
    rules: dict[str, dict[tuple[int, ...], Rule]] = defaultdict(dict)
    for name, number in record.weights.items():
        key, _, inside = name.partition("[")
        rules[key][tuple(map(int, inside[:-1].split(","))) if inside else ()] = record.rules[number]
    parts: dict[str, list[str]] = defaultdict(list)  # some weights are saved in several tensors of their own
    for key in stored.shapes:
        for at, letter in enumerate(key):
            if letter == "." and key[:at] in rules:
                parts[key[:at]].append(key)
    found = []
    for key, mine in ((part, mine) for weight, mine in rules.items() for part in parts[weight] or [weight]):
        if key not in stored.shapes:
            raise CheckpointError(
                f"{stored.folder} has {key} in tensors of other names, where Megatron-Core does not find its state."
            )
        size, dtype = stored.shapes[key]
        matrix = len(size) - len(next(iter(mine))) == 2
        lookup = key.endswith(("word_embeddings.weight", "output_layer.weight"))
        muon = to == MUON and matrix and not lookup
        scalar = next((rule.name for rule in mine.values() if rule.name == "lion"), "adam") if to == MUON else "adam"
        found.append(_Weight(key, mine, size, dtype, "muon" if muon else scalar))
    return found


class _Tensors:
    """The model's tensors and the states."""

    def __init__(self, index: Index, stored: Stored, weights: list[_Weight], to: str) -> None:
        self.plan = Plan()
        self._index, self._stored, self._weights, self._to = index, stored, weights, to
        self._lost: dict[str, list[str]] = defaultdict(list)

    def write(self) -> None:
        used = {*_MASTERS, "momentum_buffer", "exp_avg", "exp_avg_sq", PEAK}  # which is no loss
        for key in self._index.metadata.state_dict_metadata:
            state = parse_state(key)
            if state is None and key != COMMON and not key.startswith(RECORD_KEY):
                self.plan.copy(self._index, key, key)
            elif state is not None and state.state not in used:
                self._lost[f"{state.state}, a state that Megatron-Core has not"].append(
                    state.weight.partition(ALONE)[0]
                )
        for weight in self._weights:
            self._write_master(weight)
            if weight.optimizer == "muon":
                self._state(weight, "momentum_buffer", "exp_avg")
            else:
                self._state(weight, "exp_avg", "momentum_buffer")
            if weight.optimizer == "adam":
                self._second_moment(weight)
            self._tell(weight)
        self.plan.lost += [f"{what}: {some(keys)}" for what, keys in self._lost.items()]

    def _write_master(self, weight: _Weight) -> None:
        if self._find("fp32_param", weight):
            self._state(weight, "fp32_param")
            self.plan.name_twice(f"{PREFIX}.fp32_param.{weight.key}", f"{PREFIX}.param.{weight.key}")
        elif weight.dtype == torch.float32:
            self.plan.name_twice(weight.key, f"{PREFIX}.param.{weight.key}")
        else:
            raise CheckpointError(
                f"{self._stored.folder} has no float32 master weight of {weight.key}, which Megatron-Core would look "
                "for: resume it once without --use-precision-aware-optimizer, and save."
            )

    def _find(self, state: str, weight: _Weight) -> dict[tuple[int, ...] | None, str]:
        """The tensors that have a state of a weight: one of all its layers (None), or one of each (its index)."""
        whole = f"{PREFIX}.{state}.{weight.key}"
        if whole in self._stored.shapes:
            return {None: whole}
        alone = {at: state_key(f"{PREFIX}.{state}{ALONE}", weight.key, at) for at in weight.rules}
        return {at: key for at, key in alone.items() if key in self._stored.shapes}

    def _state(self, weight: _Weight, *names: str) -> None:
        """A state under its first name, from what has it under one of these."""
        new = f"{PREFIX}.{names[0]}.{weight.key}"
        found: dict[Any, str] = {}
        for name in names:
            there = self._find(name, weight)
            if None in there and not found:
                self.plan.copy(self._index, there[None], new)
                return
            found = {**there, **found}
        self._assemble(weight, new, {at: (key, None) for at, key in found.items()})

    def _second_moment(self, weight: _Weight) -> None:
        """Adam's own, or estimated from the momentum where it has none."""
        new, decay = f"{PREFIX}.exp_avg_sq.{weight.key}", self._stored.momentum
        second = self._find("exp_avg_sq", weight)
        average = {**self._find("exp_avg", weight), **self._find("momentum_buffer", weight)}
        if None in second and "momentum_buffer" not in next(iter(weight.rules.values())).states:
            self.plan.copy(self._index, second[None], new)
        elif None in average:  # some rows of a Muon weight may be Adam's
            self.plan.estimate(f"{PREFIX}.exp_avg.{weight.key}", new, decay, beside=second.get(None))
        else:
            parts = {at: (second[at], None) if at in second else (key, decay) for at, key in average.items()}
            self._assemble(weight, new, parts)

    def _assemble(self, weight: _Weight, new: str, parts: Mapping[Any, tuple[str, float | None]]) -> None:
        """One tensor of all layers from one of each."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        missing = [at for at in weight.rules if at not in parts]
        if missing:
            raise CheckpointError(
                f"{self._stored.folder} has no {new} for {weight.key} at {list(missing[0])}: it is not whole."
            )
        chunks = []
        self.plan.places[new] = {}
        for at, (key, decay) in parts.items():
            for chunk in self._index.chunks(key):
                place = (*at, *chunk.offsets)
                sizes = torch.Size((*(1 for _ in at), *chunk.sizes))
                chunks.append(ChunkStorageMetadata(torch.Size(place), sizes))
                self.plan.places[new][place] = Content(key, chunk.offsets, len(at), decay)
        entries = [self._index.tensors[key] for key, _ in parts.values()]
        # Momentum of some layers may be bfloat16 beside other states in float32.
        alike = len({entry.properties.dtype for entry in entries}) == 1 and not any(
            decay for _, decay in parts.values()
        )
        entry = entries[0] if alike else in_float32(entries[0])
        self.plan.entries[new] = replace(entry, size=torch.Size(weight.size), chunks=chunks)

    def _tell(self, weight: _Weight) -> None:
        for rule in dict.fromkeys(weight.rules.values()):
            here = str(rule)
            if weight.optimizer == "muon" and "momentum_buffer" not in rule.states:
                self._lost[f"second moments of what is updated by {here} here, by muon there"].append(weight.key)
            elif weight.optimizer == "muon" and (rule.name != "muon" or rule.layout not in _SAME):
                self._lost[f"updated by {here} here, by muon ({_there(weight)}) there"].append(weight.key)
            elif weight.optimizer == "adam" and "momentum_buffer" in rule.states:
                self._lost[f"updated by {here} here, by adam there, second moments estimated"].append(weight.key)
            elif weight.optimizer == "adam" and rule.name != "adam":
                self._lost[f"updated by {here} here, by adam there"].append(weight.key)


def _there(weight: _Weight) -> str:
    return "q, k, v" if weight.key.endswith("linear_qkv.weight") else "whole"


class _Groups:
    """The param groups of each optimizer in Megatron-Core's chain."""

    def __init__(
        self, stored: Stored, record: Record, weights: list[_Weight], to: str, values: Mapping[str, float]
    ) -> None:
        self._stored, self._record, self._to, self._values = stored, record, to, values
        self._args = vars(stored.common["args"]) if stored.common.get("args") is not None else {}
        self.lost: list[str] = []
        rates = {numbers["max_lr"] for numbers in record.numbers if "max_lr" in numbers and not _decoupled(numbers)}
        self._rate = self._value("lr", lambda: next(iter(rates)) if len(rates) == 1 else None)
        if len(rates) > 1 and not self._args.get("use_mup"):
            self.lost.append(f"learning rates {sorted(rates)} of param groups: there is one, {self._rate}")
        self._groups: dict[Any, dict[str, Any]] = {}
        experts = [weight for weight in weights if _is_expert(weight.key)]
        divided = bool(experts) and self._value("expert_model_parallel_size") > 1
        for weight in weights:
            for rule in weight.rules.values():
                group = self._group(record.numbers[rule.numbers], weight.optimizer, divided and _is_expert(weight.key))
                self._groups.setdefault((_override(group), group["is_expert_parallel"]), group)
        together = "use_layer_wise_distributed_optimizer"
        self._one_chain = bool(divided and to == MUON and self._value(together, lambda: False))

    def _value(self, name: str, otherwise: Callable[[], Any] = lambda: None) -> Any:
        """An argument of the run that is to read it, which somebody must tell."""
        found = self._values.get(name, self._args.get(name))
        found = otherwise() if found is None else found
        if found is None:
            raise CheckpointError(
                f"{self._stored.folder} does not tell {name} of the run that is to read it: add --value {name}=NUMBER."
            )
        return found

    def _group(self, numbers: Mapping[str, Any], optimizer: str, expert: bool) -> dict[str, Any]:
        found = {name: numbers[name] for name in _SCHEDULED if name in numbers}
        if not _decoupled(numbers) and not self._args.get("use_mup") and found.get("max_lr") != self._rate:
            usual = (each["min_lr"] for each in self._record.numbers if each.get("max_lr") == self._rate)
            least = self._value("min_lr", lambda: next(usual, None))
            found |= {"max_lr": self._rate, "min_lr": least, "default_config": True}
        decay = self._value("weight_decay", lambda: self._stored.common.get("opt_param_scheduler", {}).get("end_wd"))
        # As Megatron-Core makes the group: a schedule sets both, and multiplies them, when it is loaded.
        found |= {"lr": found["max_lr"], "weight_decay": decay, "is_expert_parallel": expert}
        if optimizer == "muon":
            return {**found, "momentum": self._stored.momentum}
        of_adam = next((each for each in (numbers, *self._record.numbers) if "betas" in each), {})
        betas = of_adam.get("betas") or numbers.get("scalar_betas")
        betas = betas or [self._value("adam_beta1"), self._value("adam_beta2")]
        eps = self._value("adam_eps", lambda: of_adam.get("eps", numbers.get("scalar_eps")))
        named = {"optimizer": optimizer} if self._to == MUON else {}
        if optimizer != "adam":
            return {**found, **named, "betas": tuple(betas)}
        step = {"step": self._stored.step}
        return {**_OF_ADAM, **found, **named, "betas": tuple(betas), "eps": eps, **step}

    def optimizers(self) -> dict[Any, Any]:
        """The optimizer's part of the checkpoint.

        Megatron-Core sorts groups by what they override, and makes an optimizer of each name where it first occurs.
        """
        chain: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        order = sorted(self._groups.items(), key=lambda pair: (pair[0][0] is not None, pair[0][0] or (), pair[0][1]))
        for (_, expert), group in order:
            chain[group.get("optimizer"), expert and not self._one_chain].append(group)
        if self._to == ADAM:
            chain = dict(sorted(chain.items(), key=lambda pair: pair[0][1]))
        each = [_nested(groups) for groups in chain.values()]
        return dict(enumerate(each)) if len(each) > 1 else each[0]


def _nested(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """As FP32Optimizer has its groups, and as Float16OptimizerWithFloat16Params and DistributedOptimizer have them."""
    return {
        "param_groups": copy.deepcopy(groups),
        "optimizer": {"param_groups": groups},
        "param_state_sharding_type": "fully_reshardable",
    }


def _decoupled(numbers: Mapping[str, Any]) -> bool:
    return bool(numbers.get("is_decoupled_lr"))


def _is_expert(key: str) -> bool:
    return ".experts." in key


def _override(group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """What of a group is not Megatron-Core's default, as its ``param_group_override_to_tuple`` has it."""
    names = ["start_wd", "end_wd", "optimizer"]
    names += [] if group.get("default_config", True) else ["max_lr", "min_lr"]
    found = {name: group[name] for name in names if name in group}
    if group.get("wd_mult", 1.0) != 1.0:
        found["wd_mult"] = group["wd_mult"]
    return tuple(sorted(found.items())) or None
