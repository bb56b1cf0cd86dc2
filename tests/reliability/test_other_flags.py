"""One rank with another flag, environment or copy of the package: all stop before the first step, and say why."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import megatron_muon
from megatron_muon.config import PREFIX, MuonConfig, flag
from megatron_muon.errors import ConfigError
from tests.launch import FLAGS, ROOT, SCRIPT, TIMEOUT
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool

MAY_DIFFER = {"log_jsonl": "the last rank alone writes the record"}

VALUES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "custom_coefficients": (("2,-1.5,0.5",), ("3,-2,0.5",), {"coefficient_type": "custom"}),
    "param_rule": ((), ("*.linear_fc2.weight=adam",), {}),
    "transfer": ("16x2", "32x2", {"scale_mode": "unit_rms_norm", "weight_decay_method": "independent_scheduled"}),
    "blockwise_lr_mult": (1.0, 2.0, {"blockwise_period": 2}),
    "log_per_layer": (False, True, {"log_interval": 2}),
    "log_console": (False, True, {"log_interval": 2}),
    "alarm": ("warn", "stop", {"log_interval": 2}),
    "ball_radius": (1.0, 2.0, {"param_rule": ("*.linear_fc2.weight=sign",)}),
}
"""Fields that need other fields, or that have no second value in their help text: two values, and what they need."""

ONE_SIDED = ("master", "layer_wise_param_layout")
"""Of which this model takes one value alone: what is said is why it cannot take the other."""


def values_of(field: dataclasses.Field[Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The default, another value that is valid, and what it needs."""
    if field.name in VALUES:
        return VALUES[field.name]
    default, check = field.default, field.metadata["check"]
    found: list[Any] = [not default] if isinstance(default, bool) else [1, 2, 0.5]
    if isinstance(default, str):
        found = re.findall(r"\w+", field.metadata["help"])
    return default, next(value for value in found if value != default and check(value) is None), {}


FIELDS = {field.name: field for field in dataclasses.fields(MuonConfig)}


def on_rank_1(context: Callable[[], Any]) -> Any:
    return context() if dist.get_rank() == 1 else contextlib.nullcontext()


def refusals(fields: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What a build raises on this rank: for each field of ``MuonConfig``, and for the rest. Of one model, which a
    refused build leaves as it is.
    """
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training import global_vars

    from megatron_muon.plugin import environment

    layout = Layout()
    layout.initialize()
    chunks = harness.wrap(harness.build_model(layout, num_layers=1), layout)

    def refusal(name: str = "muon", **options: Any) -> str:
        try:
            get_megatron_optimizer(harness.optimizer_config(layout, name=name, **options), chunks)
        except ConfigError as error:
            return str(error)
        return ""

    of_muon = {}
    for field in map(FIELDS.__getitem__, fields):
        *values, needed = values_of(field)
        options = {PREFIX + name: value for name, value in needed.items()}
        options[PREFIX + field.name] = values[dist.get_rank()]
        of_muon[field.name] = refusal((field.metadata["readers"] or ("muon",))[0], **options)
    others = {
        name: refusal(**({name: value} if dist.get_rank() == 1 else {}))
        for name, value in {"lr": 0.02, "weight_decay": 0.2, "clip_grad": 0.5, "adam_eps": 1e-6}.items()
    }
    model = harness.unwrap(chunks[0]).config
    elsewhere: dict[str, Callable[[], Any]] = {
        "--qk-clip-threshold": lambda: mock.patch.object(model, "qk_clip_threshold", 7.0),
        "--lr-warmup-iters": lambda: mock.patch.object(
            global_vars, "_GLOBAL_ARGS", argparse.Namespace(lr_warmup_iters=7)
        ),
        "megatron_muon": lambda: mock.patch.object(environment, "__version__", "7"),
        "the hash of megatron_muon's files": lambda: mock.patch.object(environment, "_hash_of_files", lambda: "7"),
        "megatron-core": lambda: mock.patch("megatron.core.__version__", "7"),
        "torch": lambda: mock.patch.object(torch, "__version__", "7"),
        **{name: lambda name=name: mock.patch.dict(os.environ, {name: "7"}) for name in environment._VARIABLES},
    }
    for name, context in elsewhere.items():
        with on_rank_1(context):
            others[name] = refusal()
    return of_muon, others


def test_every_flag_environment_and_package(pool: RankPool) -> None:
    fields = [name for name in FIELDS if name not in MAY_DIFFER]
    (of_muon, others), second = pool.run(refusals, 2, fields)
    assert (of_muon, others) == second
    for name, message in of_muon.items():
        values = " is {} on ranks 0, {} on ranks 1. ".format(*values_of(FIELDS[name])[:2])
        assert flag(name) + ("" if name in ONE_SIDED else values) in message, (name, message)
    for name, message in others.items():
        start = f"Ranks of one model differ: {name} is " if name.lower() != name or "-" in name else ""
        assert message.startswith(start or "Ranks of one model differ: ") and name in message, (name, message)
        assert " on ranks 0, " in message and " on ranks 1" in message


def test_what_may_differ_does(pool: RankPool) -> None:
    """By a reason that is in the table, and in the code."""
    from megatron_muon.plugin import environment

    assert set(MAY_DIFFER) == set(environment._MAY_DIFFER)
    (of_muon, _), _ = pool.run(refusals, 2, list(MAY_DIFFER))
    assert of_muon == dict.fromkeys(MAY_DIFFER, "")


@pytest.mark.slow
def test_a_changed_copy_of_the_package_on_one_rank(tmp_path: Path) -> None:
    """New interpreters, of which one finds a copy with the same version first; and one of another version."""
    for number, (name, old, new) in enumerate(
        [
            ("engine/planner.py", "from __future__ import annotations", "from __future__ import annotations  # mine"),
            ("version.py", f'"{megatron_muon.__version__}"', '"0.1.1"'),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(ROOT / "megatron_muon", folder / "megatron_muon")
        path = folder / "megatron_muon" / name
        path.write_text(path.read_text().replace(old, new))
        for status, text in processes([ROOT, folder], tmp_path):
            assert status == 2, text[-3000:]
        first = processes([ROOT, folder], tmp_path)[0][1]
        assert "Ranks of one model differ: " in first and "start all ranks from one image" in first, first[-3000:]
        assert (f"megatron_muon is {megatron_muon.__version__} on ranks 0, 0.1.1 on ranks 1" in first) == (number == 1)


def processes(roots: list[Path], folder: Path) -> list[tuple[int, str]]:
    """Status and output of a rank for each folder that its Python finds the package in."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "megatron_muon", "run", "--device", "cpu", str(SCRIPT), *FLAGS.split()]
    started = []
    for rank, root in enumerate(roots):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(roots), "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        environment |= {"MASTER_ADDR": "localhost", "PYTHONPATH": str(root)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [*line, "--optimizer", "muon", "--train-iters", "1"]
        started.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]
