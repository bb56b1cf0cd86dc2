"""Trainings by the examples' own scripts, each in a process that is forked from one that has imported Megatron."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from megatron_muon.monitor import metrics

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from recipes import MODELS  # noqa: E402

TOLD = ("Newton-Schulz:", "iteration:")
"""Lines of the run's report that are kept: they say what was iterated, and in which form."""


class ScriptFailedError(Exception):
    """A script has ended with an error. The message is the end of what it wrote."""


def train(model: str, flags: list[str], *, standard: bool) -> dict[str, Any]:
    """Run the script of a model in one process on the CPU.

    Args:
        model: key of ``recipes.MODELS``.
        flags: all of the script's.
        standard: whether to iterate in the standard form where the Gram form is cheaper: no flag asks for that.

    Returns:
        for a record: the loss of the last validation, the losses of all steps, and the lines of :data:`TOLD`.

    Raises:
        ScriptFailedError: if it ends with an error, or iterates in another form.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with tempfile.TemporaryDirectory(prefix="script-") as folder:
        log, lines = Path(folder) / "log", Path(folder) / "metrics.jsonl"
        words = ["run", "--device", "cpu", str(EXAMPLES / MODELS[model].script), *flags, "--muon-log-jsonl", str(lines)]
        process = context.Process(target=_run, args=(words, log, standard))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
            process.join()
        text = log.read_text(errors="replace")
        if process.exitcode != 0:
            raise ScriptFailedError(f"{model}: status {process.exitcode}\n{text[-4000:]}")
        found = metrics.read(lines)
    told = [line for line in text.splitlines() if line.startswith(TOLD)]
    if standard and any("Gram" in line for line in told):
        raise ScriptFailedError(f"{model}: the standard form was asked for, and the run tells of {told}")
    losses = [point.loss for point in found.train]
    return {"valid_loss": found.valid.get(found.iteration), "losses": losses, "told": told}


def _run(words: list[str], log: Path, standard: bool) -> None:
    """Body of the process."""
    from megatron_muon import cli
    from megatron_muon.orthogonalize import orthogonalizer

    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="localhost")
    if standard:
        orthogonalizer.best_restarts = lambda *_, **__: None
    status = 0
    try:
        cli.main(words)
    except SystemExit as leaving:
        status = 0 if leaving.code is None else leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
