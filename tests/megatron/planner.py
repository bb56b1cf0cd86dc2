"""Plans of tiny and of published models, for tests."""

from __future__ import annotations

import contextlib
import io
import itertools
import shlex
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from megatron_muon.config import MuonConfig
from megatron_muon.engine.plan import Weight
from megatron_muon.planning.flags import Layout

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

    def ranks(self, model: str, stage: int, without: list[str]) -> list[PlannedRank]:
        """Ranks of a pipeline stage of a file of ``examples/models``, one of each kind.

        Args:
            model: name of the file.
            stage: number of the stage; the others are not built.
            without: flags of the file that are left out.
        """
        return self._executor.submit(_ranks, model, stage, without).result()

    def close(self) -> None:
        """End the process."""
        self._executor.shutdown()


class PlannedRank(NamedTuple):
    """What the plan tells of a rank of a pipeline stage."""

    layout: Layout
    options: MuonConfig
    rank: int  # within the stage
    state_bytes: int
    step_bytes: int
    weights: tuple[Weight, ...]  # Muon's, of this rank
    planned: tuple[Weight, ...]  # those that its engine plans for
    places: tuple[tuple[str, int], ...]  # data-parallel groups, and its number there
    has_main_copies: bool
    scalars: int  # elements whose state it holds for Adam


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


def _ranks(model: str, stage: int, without: list[str]) -> list[PlannedRank]:
    from megatron_muon import cpu, plugin
    from megatron_muon.commands.plan import _with_options_of_file
    from megatron_muon.planning import survey
    from megatron_muon.planning.flags import read_flags

    cpu.install()
    plugin.install()
    file = read_flags(MODELS / f"{model}.args")
    own = _with_options_of_file(Namespace(model=model, world_size=None, tokens=None), file.plan_options)
    flags = [flag for flag in file.flags if flag not in without]
    build = survey.build_stages
    with mock.patch.object(survey, "build_stages", lambda args: itertools.islice(build(args), stage, stage + 1)):
        plan = survey.make_plan(flags, own.world_size)
    weights = plan.stages[0].weights
    pairs = [(load, plan.planner.together(*load.steps)) for load in plan.stages[0].loads]
    return [
        PlannedRank(
            *(plan.layout, plan.options, load.rank, load.state_bytes, load.step_bytes),
            *(step.weights, step.planned, tuple(step.places.items())),
            has_main_copies=all(weight.element_bytes == 2 for weight in weights),
            scalars=sum(_scalars(weight, plan.layout.position(load.rank)) for weight in weights),
        )
        for load, step in pairs
    ]


def _scalars(weight: Any, position: Any) -> int:
    """Elements of a weight under Adam whose state a rank holds."""
    if weight.layout is not None:
        return 0
    if weight.owners is None:
        return int(weight.local_numel)
    place = position.expert_data if weight.by_expert_data else position.data
    return sum(elements for rank, elements in weight.owners if rank == place)


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
