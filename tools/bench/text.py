"""What was found, as tables for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NOTES", "WIDTH", "heading", "render_case"]

WIDTH = 120
"""Columns that a line may have."""

MEBIBYTE = 1 << 20

NOTES = """\
All optimizers of a case update the same weights with the same gradients, in turn, round after round; times are medians
and quartiles, those of the slowest rank.
predicted: of our step, by the model of ``plan --device`` from rates that are measured just before the rounds.
x upstream: time of megatron-core duplicated over that of the line, median and p10 to p90 of the rounds.
products: in what the matrix products were done, as seen.
error: of the update of one matrix against the exact polynomial in float64, relative: the worst matrix.
peak: what a step allocates. sent, calls: bytes and collectives of the busiest rank in a step, by the ring algorithm: of
what an all-gather of n ranks makes, a rank sends (n - 1) / n; of an all-reduce twice that.
GEMM rate: operations of all ranks per second, over the rate of a large square product in the same rounds; needed: with
symmetric results counted once.
megatron-core splits linear_qkv itself, but not gate and up (nor q, k, v where a shard cuts through a query group): it
gets them as weights of their own, so that its matrices are the same. torch.optim.Muon and emerging_optimizers get every
matrix as a weight of its own."""


def heading(machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """One paragraph on the machine and the versions."""
    what = ", ".join(machine["gpus"]) or machine["cpu"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items() if number != "not installed")
    load = machine["load_before"]
    busy = "" if load is None else f"; load {load:.1f}"
    return f"{what}; {machine['cores']} cores{busy}\n{packages}"


def render_case(entry: Mapping[str, Any]) -> str:
    """The table of one case in one dtype, and the ratios.

    Args:
        entry: of ``cases`` in the document.
    """
    rows = [_row(each, entry) for each in entry["contestants"]]
    return "\n".join([*_title(entry), "", *_table(_HEADER, rows), "", *_below(entry)])


_HEADER = (
    ("", "products", "ms a step", "predicted", "x upstream", "worst", "peak", "sent", "calls"),
    ("", "", "(quartiles)", "", "(p10-p90)", "error", "MiB", "MiB", ""),
)


def _title(entry: Mapping[str, Any]) -> list[str]:
    sizes = [f"{name} {entry[key]}" for name, key in (("TP", "tp"), ("EP", "ep")) if entry[key] > 1]
    where = f"{entry['ranks']} {entry['backend']} ranks" if entry["ranks"] > 1 else "one process"
    threads = f", torch threads: {entry['threads_per_rank']}" if entry["device"] == "cpu" else ""
    matrices = sum(block["count"] for block in entry["matrices_of_a_rank"])
    rate = entry["gemm"]["flops_per_second_of_a_rank"]
    size = entry["gemm"]["size"]
    return [
        ", ".join([f"== {entry['name']}", entry["dtype"], *sizes]),
        f"{where}{threads}; {_count(entry['parameters'])} weights, {matrices} matrices a rank; "
        f"{entry['rounds']} rounds; {rate / 1e9:,.0f} GFLOP/s a rank in {size} x {size} products",
    ]


def _row(each: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[str, ...]:
    seconds, speed, error = each["seconds"], each["upstream_over_this"], each["error"]
    alone = entry["ranks"] == 1
    name = each["name"].partition(",")[0]  # the products tell the rest
    return (
        name,
        each["product_dtype"] or "",
        f"{_ms(seconds['median'])} ({_ms(seconds['q1'])}-{_ms(seconds['q3'])})",
        "" if each["predicted_seconds"] is None else _ms(each["predicted_seconds"]["total"]),
        "" if speed is None else _spread(speed),
        "" if error is None else f"{error['worst']:.1e}",
        _mib(each["peak_bytes"]),
        "" if alone else _mib(each["bytes_of_busiest_rank"]),
        "" if alone else str(each["collectives"]),
    )


def _below(entry: Mapping[str, Any]) -> list[str]:
    """The ratios that matter, the rates, and what to know of single lines."""
    lines = [
        _ratio_line("megatron-core duplicated / ours", entry, "ratio_vs_upstream"),
        _ratio_line("megatron-core distributed / ours", entry, "ratio_vs_upstream_distributed"),
        _ratio_line("megatron-core duplicated with fp32 products / ours", entry, "ratio_vs_upstream_fp32"),
        _ratio_line("ours / AdamW", entry, "ratio_vs_adamw"),
    ]
    shares = [
        f"{each['mode'] or 'ours'} {each['share_of_gemm_rate']:.0%} ({each['share_of_gemm_rate_needed']:.0%} needed)"
        for each in entry["contestants"]
        if each["share_of_gemm_rate_needed"] is not None
    ]
    if shares:
        lines.append(f"ours, share of the GEMM rate: {', '.join(shares)}")
    lines += [f"{each['name']}: {each['note']}" for each in entry["contestants"] if each["note"]]
    return [textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines if line]


def _ratio_line(title: str, entry: Mapping[str, Any], name: str) -> str:
    if entry[name] is None:
        return ""
    return f"{title}: {_spread({'median': entry[name], **entry[f'{name}_spread']})}"


def _table(header: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [*header, *rows]) for column in range(len(header[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return [*map(line, header), "  ".join("-" * width for width in widths), *map(line, rows)]


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def _ms(seconds: float) -> str:
    """Three significant digits, more for large numbers."""
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _mib(size: float) -> str:
    mebibytes = size / MEBIBYTE
    return f"{mebibytes:.0f}" if mebibytes >= 100 else f"{mebibytes:.1f}"


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{_short(ratio['median'])} ({_short(ratio['p10'])}-{_short(ratio['p90'])})"


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"
