"""What is said of a measured step: entries of its line in the record, points of curves, a line of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_muon.monitor.table import Row, Table

__all__ = ["line", "record", "scalars"]

_LARGEST = ("unlifted", "defect", "largest_singular", "update_ratio", "spectral_norm")
"""Numbers of which the worst matrix is worth a curve of its own."""

Rows = Mapping[str, Row]


def record(table: Table, classes: Rows, layers: Rows) -> dict[str, Any]:
    """Entries of a ``muon`` line, see :mod:`megatron_muon.monitor.schema`."""
    found: dict[str, Any] = {"classes": _entries(classes)}
    if layers:
        found["layers"] = _entries(layers)
    found |= {"times": table.times, "rates": table.rates}
    logits = {"max_attention_logit": table.max_attention_logit, "heads_clipped": table.heads_clipped}
    return found | {name: value for name, value in logits.items() if value is not None}


def _entries(rows: Rows) -> dict[str, Any]:
    return {name: {"matrices": row.matrices, **row.numbers} for name, row in rows.items()}


def scalars(table: Table, classes: Rows, layers: Rows) -> dict[str, float]:
    """Points of curves by name: means, of some numbers the largest, too, and the load of experts."""
    found: dict[str, float] = {}
    for name, row in {**classes, **layers}.items():
        for stat, (_, mean, largest) in row.numbers.items():
            found[f"muon/{stat}/{name}"] = mean
            if stat in _LARGEST:
                found[f"muon/{stat} (largest)/{name}"] = largest
        if ".experts." in name and "gradient_norm" in row.numbers:
            _, mean, largest = row.numbers["gradient_norm"]
            found[f"muon/expert load (largest over mean)/{name}"] = largest / mean if mean else 0.0
    for name, (_, mean, largest) in table.times.items():
        found[f"muon/times/{name}"] = mean
        found[f"muon/imbalance/{name}"] = largest / mean if mean else 1.0
    return found | {f"muon/rates/{name}": value for name, value in table.rates.items()}


def line(table: Table, classes: Rows) -> str:
    """One line for the console."""
    return f"Muon after iteration {table.iteration}: {', '.join(_words(table, classes))}"


def _words(table: Table, classes: Rows) -> Iterator[str]:
    for stat, title in (("update_ratio", "update/weight"), ("unlifted", "not lifted"), ("defect", "defect")):
        known = {name: row for name, row in classes.items() if stat in row.numbers}
        if known:
            matrices = sum(row.matrices for row in known.values())
            mean = sum(row.numbers[stat][1] * row.matrices for row in known.values()) / matrices
            worst = max(known, key=lambda name: known[name].numbers[stat][2])
            yield f"{title} {mean:.3g} (at most {known[worst].numbers[stat][2]:.3g}, {worst})"
    for stat, title in (("zero_gradient", "without gradient"), ("nonfinite", "not finite")):
        rows = [row for row in classes.values() if stat in row.numbers]
        if count := round(sum(row.numbers[stat][1] * row.matrices for row in rows)):
            yield f"{count} of {sum(row.matrices for row in rows)} matrices {title}"
    if "step" in table.times:
        yield f"step {1000 * table.times['step'][2]:.3g} ms"
