"""``python -m megatron_muon ckpt inspect``: what a checkpoint has, and whether it is sound."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from megatron_muon.checkpoint.fingerprint import added, fingerprints, fits
from megatron_muon.checkpoint.folders import iteration_of, sizes_in
from megatron_muon.checkpoint.keys import ALONE, PREFIX, name_of, parse_state
from megatron_muon.checkpoint.reading import Index, read_index
from megatron_muon.checkpoint.record import WEIGHT, Record
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.errors import size_text

_SIZES = (
    ("tensor_model_parallel_size", "TP"),
    ("pipeline_model_parallel_size", "PP"),
    ("context_parallel_size", "CP"),
    ("expert_model_parallel_size", "EP"),
    ("data_parallel_size", "DP"),
)


def inspect(folder: Path, contents: bool = False, trust: bool = False) -> dict[str, Any]:
    """Everything about a checkpoint, as plain data.

    Args:
        folder: of one iteration.
        contents: also read all tensors, one part at a time, and look for numbers that are not finite and for tensors
            that are not what was saved.
        trust: read pickles in full, which may run code.

    Raises:
        CheckpointError: if files are missing or too short, or name code that would be run.
    """
    index = read_index(folder, trust)
    stored = index.stored
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "elements": 0, "bytes": 0})
    for key, entry in index.tensors.items():
        found = parse_state(key)
        elements = torch.Size(entry.size).numel()
        kind = kinds[found.state if found else "model"]
        kind["tensors"] += 1
        kind["elements"] += elements
        kind["bytes"] += elements * entry.properties.dtype.itemsize
    args = stored.common.get("args")
    record, files = stored.record, sizes_in(folder)
    return {
        "folder": str(folder),
        "iteration": stored.common.get("iteration", iteration_of(folder)),
        "updates": stored.step,
        "form": _form(stored),
        "package": None if record is None else record.package,
        "optimizer": getattr(args, "optimizer", None),
        "layout": {short: getattr(args, name, None) for name, short in _SIZES} if args is not None else None,
        "world_size": getattr(args, "world_size", None),
        "files": sum(name.endswith(".distcp") for name in files),
        "bytes_on_disk": sum(files.values()),
        "kinds": dict(kinds),
        "rules": _rules(stored) if record is not None else [],
        "numbers": [] if record is None else record.numbers,
        "problems": _problems(index, record) if contents else None,
    }


def _form(stored: Stored) -> str:
    if stored.record is not None:
        return "megatron_muon: read at every layout"
    if stored.buckets:
        return "Megatron-Core, the distributed optimizer's buckets: read at the same TP and PP only"
    if any(key.startswith(f"{PREFIX}.param.") for key in stored.shapes):
        return "Megatron-Core, fully reshardable distributed optimizer"
    return "Megatron-Core, plain" if any(map(parse_state, stored.shapes)) else "no optimizer state"


def _rules(stored: Stored) -> list[dict[str, Any]]:
    """Weights of one key and one rule on a line."""
    assert stored.record is not None
    record, lines = stored.record, Counter[tuple[str, int]]()
    for name, rule in record.weights.items():
        lines[name.partition("[")[0], rule] += 1
    return [
        {
            "weight": key,
            "count": count,
            "shape": list(stored.shapes[key][0]) if key in stored.shapes else None,
            "rule": record.rules[rule].name,
            "layout": record.rules[rule].layout,
            "states": list(record.rules[rule].states),
        }
        for (key, rule), count in sorted(lines.items())
    ]


def _problems(index: Index, record: Record | None) -> list[str]:
    """What is wrong with stored tensors: numbers that are not finite, sums that are not those saved. Reads all."""
    found: list[str] = []
    shares: list[tuple[tuple[str, str], int]] = []
    names = () if record is None else (*record.weights, *record.sums, *record.model)
    depths = {name.partition("[")[0]: _depth(name) for name in names}
    for key in sorted(index.tensors):
        state = parse_state(key)
        weight, _, alone = (key if state is None else state.weight).partition(ALONE)
        depth = 0 if alone else depths.get(weight, 0)
        for chunk in index.chunks(key):
            tensor = index.tensor(chunk)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                found.append(f"{key} has numbers that are not finite, at {list(chunk.offsets)}")
            where = map(int, alone.split(".")) if alone else chunk.offsets[:depth]
            place = name_of(weight, where), WEIGHT if state is None else state.state
            own = tensor.reshape(tensor.shape[depth:])
            shares += zip([place], fingerprints([own], [chunk.offsets[depth:]]), strict=True)
    for (name, kind), value in added(shares).items():
        if record is not None and not fits(record.sum_of(name, kind), value):
            found.append(f"{kind} of {name} is not what was saved")
    return found


def _depth(name: str) -> int:
    """How many axes of layers and experts the tensor of a weight has."""
    _, bracket, inside = name.partition("[")
    return inside.count(",") + 1 if bracket else 0


def render(found: dict[str, Any]) -> str:
    """What :func:`inspect` has found, as text."""
    layout = found["layout"]
    where = "unknown layout" if layout is None else " ".join(f"{name} {size}" for name, size in layout.items() if size)
    ranks = f", {found['world_size']} ranks" if found["world_size"] else ""
    lines = [
        found["folder"],
        f"iteration {found['iteration']}, {found['updates']} updates by --optimizer {found['optimizer'] or 'unknown'}",
        f"saved at {where}{ranks}",
        f"optimizer state: {found['form']}" + (f" (written by {found['package']})" if found["package"] else ""),
        f"{found['files']} files, {size_text(found['bytes_on_disk'])}",
        "",
        f"{'':16}  {'tensors':>7}  {'elements':>15}  {'size':>10}",
    ]
    lines += [
        f"{kind:16}  {each['tensors']:>7}  {each['elements']:>15,}  {size_text(each['bytes']):>10}"
        for kind, each in sorted(found["kinds"].items(), key=lambda pair: (pair[0] != "model", pair[0]))
    ]
    if found["rules"]:
        width = max(len(rule["weight"]) for rule in found["rules"])
        lines += ["", f"{'weight':{width}}  {'count':>5}  rule"]
        lines += [
            f"{rule['weight']:{width}}  {rule['count']:>5}  {rule['rule']}"
            + (f" ({rule['layout']})" if rule["layout"] else "")
            for rule in found["rules"]
        ]
    lines += ["", "files are there and as long as their index says"]
    if found["problems"] is None:
        lines.append("contents not read (--contents reads them)")
    else:
        lines += found["problems"] or ["all numbers are finite, and tensors are what was saved"]
    return "\n".join(lines)
