"""What runs in the process of a part: its items, one after the other, each reported as soon as it is done."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from tools.gpu_check.report import FAILED, NOT_RUN, UNFINISHED, Item, NotRunError, Report, Setting

FAULT = 70
"""Exit code after a fault of the device, which ends this process: the items that are left need another."""


def run_items(items: Sequence[Item], done: Sequence[str], later: Sequence[str], setting: Setting, out: IO[str]) -> int:
    """Run what is not yet done.

    Args:
        items: of the part.
        done: names of those to be left alone.
        later: names of those that come after all others.
        setting: of the part.
        out: gets a JSON line for each event: ``items`` (all names), ``begin``, and ``end`` with the result.

    Returns:
        the exit code: 0, or :data:`FAULT`.
    """

    def say(**event: Any) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    say(event="items", names=[item.name for item in items])
    for item in sorted(items, key=lambda item: item.name in later):
        if item.name in done:
            continue
        if time.time() >= setting.deadline:
            say(event="end", item=item.name, result={"state": UNFINISHED, "reason": "no time was left"})
            continue
        say(event="begin", item=item.name, limit=item.limit)
        print(f"--- {item.name}", flush=True)
        begin = time.perf_counter()
        result = _result(item)
        say(event="end", item=item.name, result=result | {"seconds": time.perf_counter() - begin})
        if result["state"] == FAILED and setting.is_gpu and _is_broken():
            return FAULT
    return 0


def _result(item: Item) -> dict[str, Any]:
    report = Report()
    try:
        item.run(report)
    except NotRunError as error:
        report.notes.append(f"not run: {error}")
        # What it has said before is kept, and counts.
        return report.as_dict() | ({} if report.checks or report.targets else {"state": NOT_RUN, "reason": str(error)})
    except Exception as error:
        traceback.print_exc()
        text = traceback.format_exc().splitlines()
        reason = f"{type(error).__name__}: {error}"
        return report.as_dict() | {"state": FAILED, "reason": reason[:2000], "traceback": text[-40:]}
    return report.as_dict()


def _is_broken() -> bool:
    """Whether the device answers no more in this process."""
    import torch

    try:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").add_(1).item()
    except Exception:
        return True
    return False


def main(path: str) -> int:
    """Run the job of a file, ``{"part", "device", "deadline", "folder", "done", "later", "lines"}``."""
    job = json.loads(Path(path).read_text())
    setting = Setting(job["device"], job["deadline"], Path(job["folder"]))
    with Path(job["lines"]).open("a", encoding="utf-8") as out:
        module = import_module(job["module"])
        return run_items(module.items(setting), job["done"], job["later"], setting, out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
