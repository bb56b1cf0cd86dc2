"""Markdown tables of what runs of ``python -m tools.bench --json FILE`` on one machine found.

python -m tools.bench.tables FILE ... > docs/results/bench.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MEBIBYTE = 1 << 20


def main(paths: Sequence[str]) -> None:
    """Print the page."""
    documents = [json.loads(Path(path).read_text()) for path in paths]
    machine = documents[0]["machine"]
    for path, document in zip(paths, documents, strict=True):
        if (document["machine"]["cpu"], document["versions"]) != (machine["cpu"], documents[0]["versions"]):
            sys.exit(f"{path}: another machine or other versions than {paths[0]}: make a page of its own.")
    versions = {name: number for name, number in documents[0]["versions"].items() if number != "not installed"}
    print("# The optimizer step, measured\n")
    for number, document in enumerate(documents, 1):
        words = [*document["command"], "--json"]
        at = words.index("--json")
        print(f"    {' '.join(words[:at] + words[at + 2 : -1])} --json FILE{number}")
    print(f"    python -m tools.bench.tables {' '.join(f'FILE{number}' for number in range(1, len(documents) + 1))}\n")
    cases = [case for document in documents for case in document["cases"]]
    print(f"{', '.join(machine['gpus']) or machine['cpu']}, {machine['cores']} cores.", end=" ")
    print(f"{', '.join(f'{name} {number}' for name, number in versions.items())}.\n")
    print(
        "Times are medians, with quartiles; ratios are medians of the ratio in the same round, with p10 to p90. "
        "Predicted: what the model of `plan --device` says of our step, by rates that are measured just before the "
        "rounds (products of other shapes, passes over memory, messages), and its difference from the median. Error: "
        "relative, of an update against the exact polynomial in float64, worst matrix and mean. Bytes of the busiest "
        "rank, by the ring algorithm. More ranks than cores share these: compare lines of one table only.\n"
    )
    print("## Ratios\n")
    print(
        "| case | dtype | Megatron-Core `duplicated` / ours | `distributed` / ours | `duplicated` in fp32 / ours "
        "| ours / AdamW |"
    )
    print("|---|---|---|---|---|---|")
    names = ("ratio_vs_upstream", "ratio_vs_upstream_distributed", "ratio_vs_upstream_fp32", "ratio_vs_adamw")
    for case in cases:
        print(f"| {_label(case)} | {case['dtype']} | {' | '.join(_ratio(case, name) for name in names)} |")
    for case in cases:
        _table(case)


def _label(case: Mapping[str, Any]) -> str:
    sizes = [f"{name} {case[key]}" for name, key in (("TP", "tp"), ("EP", "ep")) if case[key] > 1]
    return ", ".join([case["name"], *(sizes or ["one process"])])


def _ratio(case: Mapping[str, Any], name: str) -> str:
    return "" if case[name] is None else _spread(case[name], case[f"{name}_spread"])


def _spread(median: float, spread: Mapping[str, float]) -> str:
    return f"{median:.2f} ({spread['p10']:.2f}-{spread['p90']:.2f})"


def _predicted(predicted: float, measured: float) -> str:
    return f"{predicted * 1e3:.0f} ({predicted / measured - 1.0:+.0%})"


def _table(case: Mapping[str, Any]) -> None:
    gemm = case["gemm"]
    matrices = sum(block["count"] for block in case["matrices_of_a_rank"])
    print(f"\n## {_label(case)}, {case['dtype']}\n")
    print(
        f"{case['parameters'] / 1e6:.1f} M weights, {matrices} matrices on a rank; {case['rounds']} rounds; a rank "
        f"does {gemm['flops_per_second_of_a_rank'] / 1e9:.0f} GFLOP/s in products of {gemm['size']} rows.\n"
    )
    print(
        "| | products | ms a step | predicted | x upstream | error | peak MiB | sent MiB | calls "
        "| of the GEMM rate (needed) |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for each in case["contestants"]:
        seconds, speed, error, share = (
            each[key] for key in ("seconds", "upstream_over_this", "error", "share_of_gemm_rate")
        )
        needed, predicted = each["share_of_gemm_rate_needed"], each["predicted_seconds"]
        cells = [
            each["name"].partition(",")[0],
            each["product_dtype"] or "",
            "{:.0f} ({:.0f}-{:.0f})".format(*(seconds[key] * 1e3 for key in ("median", "q1", "q3"))),
            "" if predicted is None else _predicted(predicted["total"], seconds["median"]),
            "" if speed is None else _spread(speed["median"], speed),
            "" if error is None else f"{error['worst']:.1e}, {error['mean']:.1e}",
            f"{each['peak_bytes'] / MEBIBYTE:.1f}",
            f"{each['bytes_of_busiest_rank'] / MEBIBYTE:.1f}" if case["ranks"] > 1 else "",
            f"{each['collectives']}" if case["ranks"] > 1 else "",
            "" if needed is None else f"{share:.0%} ({needed:.0%})",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
