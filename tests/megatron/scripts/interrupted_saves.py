"""Kill a training run at random moments while it saves, again and again; look at what each kill leaves, and resume.

Run by ``test_interrupted_saves.py``: ``interrupted_saves.py FOLDER TRIALS SEED FLAGS...``. Megatron is imported once;
each run is a fork. Exits with an error at the first thing that is wrong, else writes ``FOLDER/report.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import time
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import torch

import megatron_muon
from megatron_muon import cpu
from megatron_muon.checkpoint import folders
from tests.checkpoints import contents, differences

EXAMPLES = Path(__file__).parents[3] / "examples"
MODEL = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 2 --seq-length 16 "
    "--max-position-embeddings 16 --position-embedding-type rope --normalization RMSNorm --swiglu "
    "--disable-bias-linear --untie-embeddings-and-output-weights --micro-batch-size 2 --global-batch-size 2 --lr 1e-2 "
    "--min-lr 1e-3 --lr-decay-style cosine --eval-iters 1 --eval-interval 1000 --log-interval 1 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 63 --attention-dropout 0 --hidden-dropout 0 --num-workers 0 "
    "--optimizer muon --save-interval 1 --ckpt-format torch_dist"
)
RUN_LIMIT_S = 60
SAVES = re.compile(r"\[([^]]+)\] (saving checkpoint at|successfully saved checkpoint from) iteration +(\d+) ")
LOADED = re.compile(r"loading distributed checkpoint from .* at iteration (\d+)")


def main(folder: Path, trials: int, seed: int, flags: list[str]) -> None:
    """Run the trials and write the report."""
    prepare()
    chance = random.Random(seed)
    iterations = 3 * trials + 3
    straight = Runs(folder, "straight", iterations, flags)
    straight.finish(straight.start())
    typical = statistics.median(straight.save_durations())

    killed = Runs(folder, "killed", iterations, flags)
    hits, resumed = 0, []
    for trial in range(trials):
        expected = killed.expected()
        child = killed.start()
        # The first kill is at the first sign of a save; later ones at any moment up to about its end.
        delay = chance.uniform(0.0, typical) if trial else 0.0
        began = killed.wait_for_save(child, expected + chance.choice((1, 2, 2, 3)))
        while time.monotonic() < began + delay:
            time.sleep(0.0005)
        stop(child)
        resumed.append(killed.check_start(expected))
        hits += killed.check_folders(straight.root) > 0
        if trial == trials // 2 and folders.newest(killed.root) is not None:
            # What a kill between the opening and the writing of the tracker leaves; the moment is too short to hit.
            (killed.root / folders.TRACKER).write_text("")
    expected = killed.expected()
    killed.finish(killed.start())
    resumed.append(killed.check_start(expected))
    killed.check_folders(straight.root)
    report = {
        "hits": hits,
        "resumed": resumed,
        "typical_save_s": typical,
        "iterations": iterations,
        "straight": straight.losses(),
        "killed": killed.losses(),
    }
    (folder / "report.json").write_text(json.dumps(report))


def prepare() -> None:
    """Import what the forks share."""
    cpu.install()
    megatron_muon.install()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    import_script()
    del sys.modules["__main__"].__file__  # or each process that Megatron starts would import all of this first


def import_script() -> Any:
    """The example's script, which finds the hooks in place."""
    import pretrain_gpt

    return pretrain_gpt


class Runs:
    """Runs that save in, and load from, one folder.

    Args:
        folder: of everything.
        name: of these runs.
        iterations: at which a run that is not killed ends.
        flags: of Megatron, in addition to those of this module; with --enable-msc, the folder is a store of its name.
    """

    def __init__(self, folder: Path, name: str, iterations: int, flags: list[str]) -> None:
        self.root = folder / name
        self.root.mkdir()
        self.log = folder / f"{name}.jsonl"
        self.output = folder / f"{name}.txt"
        place = f"msc://{folder.name}/{name}" if "--enable-msc" in flags else str(self.root)  # a profile of that name
        own = f"--save {place} --load {place} --muon-log-jsonl {self.log} --train-iters {iterations}"
        self.flags = [*MODEL.split(), *own.split(), *flags]
        self.seen: dict[str, Any] = {}

    def start(self) -> int:
        """Fork a run; its process id."""
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            with self.output.open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            # Port 0: the store of the only rank takes one that is free.
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
            sys.argv = ["pretrain_gpt.py", *self.flags]
            import_script().main()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def finish(self, child: int) -> None:
        """Wait for a run that must come to its end."""
        deadline = time.monotonic() + RUN_LIMIT_S
        while (status := ended(child)) is None:
            if time.monotonic() > deadline:
                stop(child)
                raise AssertionError(f"a run did not end within {RUN_LIMIT_S} s:\n{self.tail()}")
            time.sleep(0.01)
        assert status == 0, self.tail()

    def tail(self) -> str:
        """The end of what the last run printed."""
        return self.output.read_text()[-4000:]

    def wait_for_save(self, child: int, iteration: int) -> float:
        """Wait until the folder of an iteration appears or changes; the time."""
        folder = self.root / f"iter_{iteration:07d}"
        before = (folder.exists(), state_of(folder))
        deadline = time.monotonic() + RUN_LIMIT_S
        while (folder.exists(), state_of(folder)) == before:
            if ended(child) is not None or time.monotonic() > deadline:
                raise AssertionError(f"the run did not save iteration {iteration}:\n{self.tail()}")
            time.sleep(0.001)
        return time.monotonic()

    def save_durations(self) -> list[float]:
        """Seconds that each save of the last run took, from what it printed."""
        times: dict[str, list[datetime]] = {}
        for moment, _, iteration in SAVES.findall(self.output.read_text()):
            times.setdefault(iteration, []).append(datetime.fromisoformat(moment))
        return [(end - begin).total_seconds() for begin, end in times.values()]

    def losses(self) -> list[float]:
        """Of every iteration, as the log has them in the end."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        found = {line["iteration"]: line["losses"]["lm loss"] for line in lines if line["kind"] == "train"}
        return [found[iteration] for iteration in sorted(found)]

    def expected(self) -> int:
        """The iteration that the next run must go on from; 0 if there is nothing to load."""
        if not (self.root / folders.TRACKER).is_file():
            return 0
        text = folders.tracked(self.root)
        if folders.is_tracker_text(text):
            assert text is not None
            iteration = int(text)
            assert folders.is_whole(self.root / f"iter_{iteration:07d}"), f"the tracker names {iteration}, not whole"
            return iteration
        newest = folders.newest(self.root)
        assert newest is not None, f"the tracker says {text!r}, and there is no whole checkpoint"
        return newest

    def check_start(self, expected: int) -> int:
        """The run that has ended went on from the checkpoint that it should have."""
        found = LOADED.findall(self.output.read_text())
        loaded = int(found[-1]) if found else 0
        assert loaded == expected, f"loaded {loaded} in place of {expected}:\n{self.tail()}"
        return loaded

    def check_folders(self, straight: Path) -> int:
        """What passes for whole has the uninterrupted run's tensors, all of them; how many were left in part."""
        self.expected()
        partial = 0
        for folder in sorted(self.root.glob("iter_*")):
            signature = state_of(folder)
            if self.seen.get(folder.name) == signature:
                continue
            if folders.is_whole(folder):
                assert contents(str(folder)), folder
                assert differences(str(straight / folder.name), str(folder)) == [], folder
            else:
                partial += 1
            self.seen[folder.name] = signature
        return partial


def state_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files of a folder; empty if it does not exist."""
    found = []
    with contextlib.suppress(FileNotFoundError):  # a file may go while this looks
        for path in sorted(folder.iterdir()):
            status = path.stat()
            found.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(found)


_STATUS: dict[int, int] = {}


def ended(child: int) -> int | None:
    """A child's exit status; None while it runs."""
    if child not in _STATUS:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            _STATUS[child] = status
    return _STATUS.get(child)


def stop(child: int) -> None:
    """Kill a child that is still running, without a chance for it to do anything."""
    assert ended(child) is None, "the run had ended before it was killed"
    helpers = psutil.Process(child).children(recursive=True)
    os.kill(child, signal.SIGKILL)
    _, _STATUS[child] = os.waitpid(child, 0)
    for helper in helpers:
        with contextlib.suppress(psutil.NoSuchProcess):
            helper.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
