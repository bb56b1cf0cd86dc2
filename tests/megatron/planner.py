"""Plans of tiny and of published models, for tests."""

from __future__ import annotations

import contextlib
import io
import shlex
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

MODELS = Path(__file__).parents[2] / "examples" / "models"

TINY = shlex.split("""
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --kv-channels 8 --ffn-hidden-size 48 --swiglu
    --disable-bias-linear --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
    --vocab-size 64 --make-vocab-size-divisible-by 8 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --global-batch-size 4 --optimizer muon
""")
GROUPS = ["--group-query-attention", "--num-query-groups", "2"]


class Planner:
    """Plans in a process of its own, where hooks and the CPU runtime may stay, with all imports made."""

    def __init__(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])  # as tests.pool does, from the same process
        self._executor = ProcessPoolExecutor(max_workers=1, mp_context=context)

    def document(self, flags: list[str], world: int) -> dict[str, Any]:
        """What ``--json`` writes, for Megatron's flags."""
        return self._executor.submit(_document, flags, world).result()

    def text(self, flags: list[str], world: int) -> str:
        """What is printed."""
        return self._executor.submit(_text, flags, world).result()

    def command(self, arguments: list[str]) -> Outcome:
        """``python -m megatron_muon plan``, but for the start of a process."""
        return self._executor.submit(_command, arguments).result()

    def close(self) -> None:
        """End the process."""
        self._executor.shutdown()


class Outcome(NamedTuple):
    """Of one command."""

    code: Any
    text: str
    errors: str


def _command(arguments: list[str]) -> Outcome:
    from megatron_muon import cli

    stdout, stderr = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        try:
            cli.main(["plan", *arguments])
        except SystemExit as end:
            code = end.code
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def _document(flags: list[str], world: int) -> dict[str, Any]:
    from megatron_muon.planning.document import to_document

    return to_document(_plan(flags, world))


def _text(flags: list[str], world: int) -> str:
    from megatron_muon.planning.text import render

    return render(_plan(flags, world))


def _plan(flags: list[str], world: int) -> Any:
    from megatron_muon import cpu, plugin
    from megatron_muon.planning.survey import make_plan

    cpu.install()
    plugin.install()
    return make_plan(flags, world)
