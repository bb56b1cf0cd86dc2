"""Measure the rates of the device that is here, for the table of ``python -m megatron_muon plan --device``.

    python -m tools.rates                   # print them
    python -m tools.rates --add h200        # put them into the table, in place of what it has for this device
    torchrun --nproc-per-node 8 -m tools.rates --add h200       # with messages between the GPUs of a node

It is made for GPUs; on CPUs it takes some minutes, and says nothing until its end. What cannot be measured here
(messages of one rank) stays as the table has it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_muon.planning import rates as table
from megatron_muon.planning.rates import Rates
from tools.bench.calibrate import NUMBERS, calibrate
from tools.bench.ranks import choose_device, joined

TABLE = Path(table.__file__).with_name("devices.json")


def measured(device: str, scale: float = 3.0) -> Rates:
    """The rates of ``cuda`` or ``cpu`` here; ``scale``: how long it may take, 1 is a few seconds."""
    with joined(device) as world:
        numbers = [name for name in NUMBERS if device == "cuda" or name in ("float32", "bfloat16")]
        return calibrate(world, numbers, scale)


def merged(name: str, found: Rates, known: Rates | None) -> Rates:
    """What was found, and the rest of what is known of the device."""
    left = {} if known is None else dict(known.numbers)
    own = {key: value for key, value in found.numbers.items() if known is None or key != "node"}
    sources = {} if known is None else dict(known.sources)
    return Rates(name, left | own, sources | {key: found.sources[key] for key in own})


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is")
    parser.add_argument("--add", metavar="NAME", help="name in the table, such as h200")
    args = parser.parse_args(argv)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    found = measured(choose_device(args.device, ranks))
    if os.environ.get("RANK", "0") != "0":
        return
    devices = dict(table.devices())
    known = Rates.read(devices[args.add]) if args.add in devices else None
    entry = merged(found.name if known is None else known.name, found, known).entry()
    print(json.dumps(entry, indent=1))
    if args.add is not None:
        TABLE.write_text(json.dumps(devices | {args.add: entry}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
