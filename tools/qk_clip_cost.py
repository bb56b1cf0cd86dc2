"""What QK-clip costs in a step: the same model without it, measured only, and clipped, in alternation in one process.

    python tools/qk_clip_cost.py [--steps 20]

A GPT of 4 layers (hidden size 512, 8 heads, 2 key heads, sequences of 512) with Muon, on one process. Prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = {
    "hidden_size": 512,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 8,
    "kv_channels": 64,
    "num_query_groups": 2,
    "init_method_std": 0.05,
}

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "without": ({}, "auto"),
    "measured only": ({"log_max_attention_logit": True}, "auto"),
    "clipped": ({"qk_clip": True, "qk_clip_threshold": 0.1}, "auto"),
    "clipped, --muon-qk-logits exact": ({"qk_clip": True, "qk_clip_threshold": 0.1}, "exact"),
    "clipped, --muon-qk-logits lse": ({"qk_clip": True, "qk_clip_threshold": 0.1}, "lse"),
}


def measure(steps: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of whole steps and of the optimizer's part, by case."""
    from tests.megatron import harness

    layout = harness.Layout()
    data = harness.Data(sequence=512, global_batch=2)
    runs = {}
    for name, (flags, source) in CASES.items():
        if not runs:
            run = harness.start(layout, data=data, optimizer={"muon_qk_logits": source}, **SIZES, **flags)
        else:
            run = another(harness, layout, data, source, {**SIZES, **flags})
        runs[name] = run
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for step in range(steps + 2):
        for name, run in runs.items():
            update = run.optimizer.step
            spent: list[float] = []

            def timed(update: Any = update, spent: list[float] = spent) -> Any:
                begin = time.perf_counter()
                result = update()
                spent.append(time.perf_counter() - begin)
                return result

            run.optimizer.step = timed
            begin = time.perf_counter()
            run.losses(1)
            whole = time.perf_counter() - begin
            run.optimizer.step = update
            if step >= 2:
                times[name][0].append(whole)
                times[name][1].append(spent[0])
    return times


def another(harness: Any, layout: Any, data: Any, source: str, build: dict[str, Any]) -> Any:
    """One more run in the process groups that are there."""
    from megatron.core.optimizer import get_megatron_optimizer

    chunks = harness.wrap(harness.build_model(layout, data=data, **build), layout)
    config = harness.optimizer_config(layout, muon_qk_logits=source)
    return harness.Run(layout, chunks, get_megatron_optimizer(config, chunks), data)


def main() -> None:
    """Measure on a rank of the tests' pool and print."""
    from tests.pool import RankPool

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    pool = RankPool()
    try:
        times = pool.run(measure, 1, steps, timeout=1800)[0]
    finally:
        pool.close()
    base = statistics.median(times["without"][0])
    print("| | ms a step | of it in the optimizer | step / without |\n|---|---|---|---|")
    for name, (whole, optimizer) in times.items():
        median = statistics.median(whole)
        print(f"| {name} | {1e3 * median:.1f} | {1e3 * statistics.median(optimizer):.1f} | {median / base:.3f} |")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
