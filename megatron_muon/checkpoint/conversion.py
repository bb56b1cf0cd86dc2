"""``python -m megatron_muon ckpt convert``: a checkpoint for another optimizer, this package's or Megatron-Core's own.

Tensors are copied as they are stored. What one optimizer has and the other calls by another name is stored once and
named twice; a second moment that Muon has not is estimated, one part of a tensor at a time, and stored as one number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from megatron_muon.checkpoint import exporting, folders
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.keys import PREFIX, RECORD_KEY, parse_state, without_chain
from megatron_muon.checkpoint.reading import COMMON, Index, read_index
from megatron_muon.checkpoint.record import RECORD, Record
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.checkpoint.writing import Plan, write
from megatron_muon.version import __version__

TARGETS = ("muon", "adam", *exporting.TARGETS)


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    values: Mapping[str, float] | None = None,
    workers: int | None = None,
    trust: bool = False,
    tell: Callable[[str], None] = print,
) -> int:
    """Write a checkpoint that runs of the other optimizer resume from; called again, it goes on where it was stopped.

    Args:
        source: folder of one iteration, which is only read.
        target: a new folder for a run.
        to: one of :data:`TARGETS`.
        values: arguments of the run that the checkpoint does not tell, by Megatron's names.
        workers: files that are written at once; as many as there are cores by default, eight at most.
        trust: read pickles in full, which may run code.
        tell: is given what the new checkpoint cannot have, before anything is written.

    Returns:
        its iteration.

    Raises:
        CheckpointError: if the source has not what is needed, or the target is something else.
    """
    index = read_index(source, trust)
    stored = index.stored
    if stored.buckets:
        raise CheckpointError(
            f"{source} has optimizer state in the form of the distributed optimizer's buckets, which only the same "
            "optimizer at the same layout reads. Resume it once with --dist-ckpt-optim-fully-reshardable and save."
        )
    if not any(map(parse_state, index.tensors)):
        raise CheckpointError(f"{source} has no optimizer state: there is nothing to convert.")
    iteration = int(stored.common.get("iteration", folders.iteration_of(source)) or 0)
    plan = exporting.plan(index, stored, to, values or {}) if to in exporting.TARGETS else _plan(index, stored, to)
    if plan.lost:
        tell("\n  ".join((f"--to {to} cannot have all of {source}:", *plan.lost)))
    options = {"to": to, "values": dict(values or {})}
    write(index, plan, target, str(iteration), workers or min(8, len(os.sched_getaffinity(0))), options)
    return iteration


def _plan(index: Index, stored: Stored, to: str) -> Plan:
    """For runs with this package: all that is there, under the names of both optimizers."""
    plan = Plan()
    for key in index.metadata.state_dict_metadata:
        if key != COMMON and not key.startswith(RECORD_KEY):
            plan.copy(index, key, without_chain(key))
    other = {"param": "fp32_param", "exp_avg": "momentum_buffer"}
    if to == "adam":
        other = {"param": "fp32_param", "momentum_buffer": "exp_avg"}
    rules = () if stored.record is None else stored.record.rules
    mixed = any({"momentum_buffer", "exp_avg_sq"} <= set(rule.states) for rule in rules)
    for key in list(plan.entries):
        found = parse_state(key)
        if found is None:
            continue
        new = f"{PREFIX}.{other.get(found.state)}.{found.weight}"
        if found.state in other and new not in plan.entries:
            plan.name_twice(key, new)
        new = f"{PREFIX}.exp_avg_sq.{found.weight}"
        if to == "adam" and found.state == "momentum_buffer" and (mixed or new not in plan.entries):
            # Rows under Adam inside a Muon weight have second moments, in a tensor that is zero elsewhere.
            plan.estimate(key, new, stored.momentum, beside=new if new in plan.entries else None)
    metadata = {**(stored.common.get("content_metadata") or {}), "distrib_optim_sharding_type": "fully_reshardable"}
    record = {RECORD: _record(stored, to, other).to_plain()}
    plan.common = {**stored.common, "optimizer": record, "content_metadata": metadata}
    return plan


def _record(stored: Stored, to: str, other: Mapping[str, str]) -> Record:
    """For any rules: the checkpoint has the state of both optimizers, with the sums of what is copied."""
    before = stored.record
    if before is None:
        return Record(stored.step, [], [], {}, [], {}, converted=to)
    sums = {}
    for name, states in before.sums.items():
        estimated = "exp_avg_sq" if to == "adam" and "momentum_buffer" in states else None
        kept = {state: value for state, value in states.items() if state != estimated}
        sums[name] = {**{other[state]: value for state, value in kept.items() if state in other}, **kept}
    return replace(before, rules=[], weights={}, sums=sums, converted=to, package=__version__)
