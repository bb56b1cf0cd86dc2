"""Training runs as processes: done once, gone on with where they were interrupted, ended in order."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from prepare_data import PreparedData
from recipes import Settings, command, flags

from megatron_muon.monitor import plots
from megatron_muon.monitor.progress import ProgressBar


class RunFailedError(Exception):
    """A training process ended with an error. The message says where its log is and how it ends."""


def train(
    optimizer: str,
    settings: Settings,
    data: PreparedData,
    folder: Path,
    title: str | None = None,
    *,
    show_report: bool = False,
) -> bool:
    """Do a run, or the rest of it, with a progress bar.

    Args:
        optimizer: key of :data:`recipes.OPTIMIZERS`.
        settings: of the run.
        data: where the datasets are.
        folder: of the run's files. If it holds a run with other settings, that one is moved away.
        title: before the progress bar; the optimizer's name by default.
        show_report: whether to print the table of who updates what, which Muon's runs write into their log.

    Returns:
        False if the run was finished already.

    Raises:
        RunFailedError: if the training process ends with an error.
        KeyboardInterrupt: on Ctrl-C, when the processes have saved a checkpoint and ended.
    """
    wanted = {"settings": asdict(settings), "flags": flags(optimizer, settings, data)}
    _move_other_run(folder, wanted)
    if (folder / "finished").exists():
        print(f"{optimizer}: finished before; its results are used. Delete {folder} to repeat it.")
        return False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(wanted, indent=1) + "\n")
    words = command(optimizer, settings, data, folder)
    log = folder / "train.log"
    with log.open("ab") as output:
        output.write(f"\n$ {shlex.join(words)}\n".encode())
        output.flush()
        begin = output.tell()
        with ProgressBar(folder / plots.METRICS_FILE, settings.steps, title or optimizer) as bar:
            report = _Report(log, begin, bar) if show_report else None
            status = _run(words, output, [bar, *([report] if report else [])], settings)
    if status != 0:
        raise RunFailedError(
            f"{optimizer}: training ended with status {status}.\n{_excerpt(log, begin)}\nThe whole log: {log}"
        )
    (folder / "finished").touch()
    return True


class _Report:
    """The table of who updates what, shown above the progress bar once it is in the log, whole."""

    def __init__(self, log: Path, begin: int, bar: ProgressBar) -> None:
        self._log, self._begin, self._bar = log, begin, bar
        self._is_shown = False

    def poll(self) -> None:
        """Look for it, and show it."""
        if self._is_shown:
            return
        text = self._log.read_bytes()[self._begin :].decode("utf-8", errors="replace")
        if found := re.search(r"^megatron_muon \d.*?\n(?=\n)", text, re.MULTILINE | re.DOTALL):
            self._is_shown = True
            self._bar.write(found[0])


def _move_other_run(folder: Path, wanted: dict[str, Any]) -> None:
    """Keep a run with other settings under another name: neither to go on from it nor to lose it."""
    try:
        found = json.loads((folder / "run.json").read_text())
    except FileNotFoundError:
        return
    if found == wanted:
        return
    changed = [
        f"{name} {found['settings'].get(name)} -> {value}"
        for name, value in wanted["settings"].items()
        if value != found["settings"].get(name)
    ]
    number = 1
    while (other := folder.with_name(f"{folder.name}-old-{number}")).exists():
        number += 1
    folder.rename(other)
    print(f"{folder.name}: the settings changed ({', '.join(changed) or 'flags'}); the old run is kept as {other}")


def _run(words: list[str], output: Any, shown: Sequence[ProgressBar | _Report], settings: Settings) -> int:
    environment = dict(os.environ)
    if settings.device == "cpu":
        # More threads than cores slow each other down; torchrun's default of one leaves cores idle.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // settings.tp)))
    with _interruptible():
        # A session of its own: Ctrl-C reaches this process only, which ends the others in order.
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None:
                _poll(shown)
                time.sleep(0.3)
            _poll(shown)
            return process.returncode
        finally:
            _end(process)


def _poll(shown: Sequence[ProgressBar | _Report]) -> None:
    for each in shown:
        each.poll()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, and SIGINT too where a shell in the background has it ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher by way of its training processes, which save a checkpoint first."""
    if process.poll() is not None:
        return
    print("\nstopping: the training processes save a checkpoint (Ctrl-C again: end at once)", flush=True)
    try:
        # Not the launcher: it would signal the helpers of the training processes too, which they need for saving.
        with contextlib.suppress(psutil.NoSuchProcess):
            for worker in psutil.Process(process.pid).children():
                worker.terminate()
        process.wait(timeout=120)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=40)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _excerpt(log: Path, begin: int, lines: int = 30) -> str:
    """What a failed run said: from its first error on, or the end."""
    text = log.read_bytes()[begin:].decode("utf-8", errors="replace").splitlines()
    errors = (i for i, line in enumerate(text) if "Traceback (most recent call last)" in line or ": error:" in line)
    first = next(errors, max(0, len(text) - lines))
    return "\n".join(f"  | {line}" for line in text[first : first + lines])
