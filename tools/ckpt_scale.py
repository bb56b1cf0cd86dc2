"""What our part of saving and loading costs each rank at the size of DeepSeek-V3, without its ranks, GPUs or tensors.

    python tools/ckpt_scale.py [--experts 256] [--layers 61] [--ranks 2048] [--profile]

61 layers, 58 of them with 256 experts of two matrices (29,696 weights), and all else that a layer has, on 2,048 ranks:
16 stages, 64 groups of experts, plain Muon in bfloat16. Each weight is 8 x 8: what depends on the size of tensors
(sums, reading, writing) is not what this measures. Two ranks, the first and one of the last stage, do all that they do
in training; what the others say is what these functions make of their weights. Collectives are made in groups of one
rank, and counted there: the times have no network in them. With --profile, where the time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import pickle
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.filesystem import FileSystemReader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megatron_muon import Muon
from megatron_muon.agree import Ranks
from megatron_muon.checkpoint import saving, weights
from megatron_muon.checkpoint.param_state import ParamState
from megatron_muon.checkpoint.record import Recorder
from megatron_muon.checkpoint.request import Request
from megatron_muon.checkpoint.sharding import noted, tensors_of
from megatron_muon.checkpoint.stored import Stored

SIDE = 8
DENSE = 3
MATRICES = ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "linear_proj")
NORMS = ("input_layernorm", "pre_mlp_layernorm", "self_attention.q_layernorm", "self_attention.kv_layernorm")
OF_EXPERTS = ("linear_fc1", "linear_fc2")


class Run:
    """A model and its optimizers on one rank.

    Attributes:
        state: of the model, as its ``sharded_state_dict()`` gives it.
        held: state of its weights.
    """

    def __init__(self, sizes: argparse.Namespace, rank: int) -> None:
        self.state: dict[str, Any] = {}
        self.params: dict[str, list[torch.nn.Parameter]] = {"muon": [], "adam": []}
        copies = sizes.ranks // sizes.stages
        stage, data = rank // copies, rank % copies
        group, copy = data % sizes.groups, data // sizes.groups
        local = sizes.experts // sizes.groups
        for layer in range(sizes.layers * stage // sizes.stages, sizes.layers * (stage + 1) // sizes.stages):
            prefix = f"decoder.layers.{layer}."
            for name in MATRICES:
                self._add(f"{prefix}self_attention.{name}.weight", "muon", data)
            for name in NORMS:
                self._add(f"{prefix}{name}.weight", "adam", data)
            shared = "mlp." if layer < DENSE else "mlp.shared_experts."
            self._add(f"{prefix}{shared}linear_fc1.weight", "muon", data, gated=True)
            self._add(f"{prefix}{shared}linear_fc2.weight", "muon", data)
            if layer < DENSE:
                continue
            self._add(f"{prefix}mlp.router.weight", "adam", data)
            for name in OF_EXPERTS:
                for expert in range(local * group, local * (group + 1)):
                    key = f"{prefix}mlp.experts.experts.{name}.weight"
                    at = (0, expert, sizes.experts)
                    self._add(key, "muon", copy, at, gated=name == OF_EXPERTS[0], name=f"{key}{expert}")
        if stage == 0:
            self._add("embedding.word_embeddings.weight", "adam", data)
        if stage == sizes.stages - 1:
            self._add("output_layer.weight", "adam", data)
        muon, adam = (self.params[rule] or [torch.nn.Parameter(torch.ones(1))] for rule in ("muon", "adam"))
        self.held = [*_held(Muon(muon, lr=0.1)), *_held(torch.optim.AdamW(adam))]

    def _add(
        self, key: str, rule: str, copy: int, *offsets: tuple[int, int, int], gated: bool = False, name: str = ""
    ) -> None:
        param = torch.nn.Parameter(torch.ones(SIDE, SIDE, dtype=torch.bfloat16))
        base = ShardedTensor.from_rank_offsets(
            key, param, *offsets, replica_id=(0, 0, copy), prepend_axis_num=len(offsets)
        )
        self.state[name or key] = apply_swiglu_sharded_factory(base, offsets) if gated else base
        self.params[rule].append(param)

    def model(self) -> saving.Model:
        """As the optimizer is given it."""
        return saving.Model(self.state, dict, {})


def _held(inner: torch.optim.Optimizer) -> Iterator[ParamState]:
    for group in inner.param_groups:
        states = ("momentum_buffer",) if isinstance(inner, Muon) else ("exp_avg", "exp_avg_sq")
        for param in group["params"]:
            master = torch.nn.Parameter(param.detach().float())
            inner.state[master] = {state: torch.zeros(SIDE, SIDE) for state in states}
            yield ParamState(param, inner, group, master, master)


class Noted(Ranks):
    """A rank whose words to the first are noted, and go nowhere."""

    def __init__(self) -> None:
        super().__init__(())
        object.__setattr__(self, "said", [])

    def to_first(self, work: Callable[[], Any]) -> None:
        """Note it."""
        self.said.append(pickle.dumps(work()))

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What no rank's words depend on."""
        return [], ""


class Watched(Ranks):
    """One of many ranks, of which the others are known beforehand; what the network has to do is counted.

    Attributes:
        is_first: whether it is the first.
        heard: of each exchange in which the ranks tell the first, what it hears from all; pickled.
        answers: what the first has told all, pickled: noted by itself, heard by another.
        counts: collectives, bytes that this rank sends, and that it receives.
    """

    def __init__(self, groups: Any, first: bool, ranks: int, heard: list[list[bytes]], answers: list[bytes]) -> None:
        super().__init__(groups)
        for name, value in {"first": first, "number": ranks, "heard": heard, "answers": answers}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "counts", [0, 0, 0])

    @property
    def is_first(self) -> bool:
        """As it was told."""
        return self.first

    def gather(self, work: Callable[[], Any]) -> list[Any]:
        """All say what this one does."""
        with self._counted():
            return super().gather(work) * self.number

    def to_first(self, work: Callable[[], Any]) -> list[Any] | None:
        """The first hears what all say."""
        with self._counted():
            super().to_first(work)
        everything = self.heard.pop(0)
        self.counts[2] += max(map(len, everything)) * self.number if self.first else 0  # torch makes all as long
        return [pickle.loads(each) for each in everything] if self.first else None

    def from_first(self, work: Callable[[], Any]) -> Any:
        """The first finds it; another hears what it has found."""
        with self._counted():
            if self.first:
                self.answers.append(pickle.dumps(value := super().from_first(work)))
                return value
            self.together(lambda: None)
            payload = [self.answers.pop(0)]
            for group in self.groups:
                dist.broadcast_object_list(payload, group=group, group_src=0)
            return pickle.loads(payload[0])

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Collectives within, once: the exchanges above use one another."""
        names = ("all_gather_single", "broadcast", "gather")
        originals = {name: getattr(distributed_c10d, name) for name in names}
        if any(hasattr(original, "counts") for original in originals.values()):
            yield
            return

        def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                given = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
                self.counts[0] += 1
                self.counts[2 if name == "broadcast" and not self.first else 1] += given[-1].nbytes
                return original(*args, **kwargs)

            call.counts = True  # type: ignore[attr-defined]
            return call

        for name, original in originals.items():
            setattr(distributed_c10d, name, counting(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(distributed_c10d, name, original)


class Checkpoint:
    """What all ranks say when they save, and a checkpoint with it."""

    def __init__(self, sizes: argparse.Namespace, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        parts, numbers, state, model = [], [], [], []
        everything: dict[str, Any] = {}
        silent = None
        for rank in range(sizes.ranks):
            data = rank % (sizes.ranks // sizes.stages)
            if data >= sizes.groups and silent is not None:  # copies of others: they save nothing
                said = silent
            else:
                run, ranks = Run(sizes, rank), Noted()
                saved = saving.saved_state(ranks, run.held, run.model(), Recorder())
                said = ranks.said
                if data >= sizes.groups:
                    silent = said
                else:
                    everything[str(rank)] = [run.state, saved[saving.WEIGHTS]]
            part, (_, packed) = map(pickle.loads, said)
            values = (int.from_bytes(packed[at : at + 16], "little") for at in range(0, len(packed), 16))
            sums = dict(zip(part.sums, values, strict=True))
            parts.append(said[0])
            numbers.append(said[1])
            for kinds, weight in ((state, False), (model, True)):
                chosen = {key: value for key, value in sums.items() if (key[1] == weights.WEIGHT) == weight}
                kinds.append(pickle.dumps(chosen))
        self.saving, self.again, self.loading = [parts, numbers], [numbers], [state, model]
        self.everything = everything

    def write(self, record: dict[str, Any]) -> None:
        """With Megatron-Core, by this process alone, and the first rank's record."""
        from megatron.core import dist_checkpointing

        object_ = record.pop(saving.OBJECT)
        del record[saving.WEIGHTS]
        ours = [each for each in tensors_of(noted(self.everything)) if each.replica_id == (0, 0, 0)]
        whole = dict(enumerate(ours))
        dist_checkpointing.save({"optimizer": {**record, "record": object_}, "all": whole}, self.folder)


@contextlib.contextmanager
def index_read_before(folder: Path) -> Iterator[Callable[[], Any]]:
    """Reads the index when it is first asked for it, and never again: a load reads it once, with Megatron-Core's."""
    original, index = FileSystemReader.read_metadata, functools.cache(lambda: original(FileSystemReader(str(folder))))
    FileSystemReader.read_metadata = lambda self, *args, **kwargs: index()  # type: ignore[method-assign]
    try:
        yield index
    finally:
        FileSystemReader.read_metadata = original  # type: ignore[method-assign]


def save(run: Run, recorder: Recorder, ranks: Ranks) -> dict[str, Any]:
    """As the optimizer's ``sharded_state_dict`` does."""
    return saving.saved_state(ranks, run.held, run.model(), recorder)


def load(run: Run, folder: Path, ranks: Ranks) -> None:
    """As the hook on ``dist_checkpointing.load`` and ``load_state_dict`` do; what is read is there already."""
    described = weights.described(run.state)
    request = Request(ranks, run.held, run.model(), False, lambda stored: {}, lambda *rest: "")
    stored = Stored.read(str(folder), [ranks])
    assert not stored.misfits(tensors_of(noted(run.state)))
    request.resolve(stored)
    loaded = {
        name: {state: {number: part.data for number, part in parts.items()} for state, parts in states.items()}
        for name, states in request[saving.WEIGHTS].items()
    }
    content = {path[0]: leaf.data for path, leaf in described.items()}
    request.fill({saving.WEIGHTS: loaded})
    weights.check(ranks, described, content, stored)


def phases(sizes: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Watched, Callable[[], Any]]]:
    """What is done, by which rank, and the work: it is to be called before the next is asked for."""
    checkpoint = Checkpoint(sizes, folder)
    groups = tuple(dist.new_group([0]) for _ in range(2))  # model-parallel, data-parallel
    answers: list[list[bytes]] = [[], [], [], []]
    names = ("first save", "later save", "index, read by Megatron-Core as well", "load")
    for first in (True, False):
        run, recorder, found = (
            Run(sizes, 0 if first else sizes.ranks - sizes.ranks // sizes.stages + 1),
            Recorder(),
            dict[str, Any](),
        )
        saving, loading = functools.partial(save, run, recorder), functools.partial(load, run, folder)
        with index_read_before(folder) as index:
            works = (saving, saving, lambda ranks, index=index: dict.fromkeys([], index()), loading)
            heard = (checkpoint.saving, checkpoint.again, [], checkpoint.loading)
            for number, (name, said, work) in enumerate(zip(names, heard, works, strict=True)):
                if first and number == 2:
                    checkpoint.write(found)
                ranks = Watched(groups, first, sizes.ranks, list(said), answers[number])

                def do(work: Callable[..., Any] = work, ranks: Watched = ranks, found: dict[str, Any] = found) -> None:
                    found |= work(ranks) or {}

                yield name, ranks, do


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--ranks", type=int, default=2048)
    parser.add_argument("--stages", type=int, default=16, help="of the pipeline")
    parser.add_argument("--groups", type=int, default=64, help="of experts")
    parser.add_argument("--profile", action="store_true", help="")
    sizes = parser.parse_args()
    from megatron_muon import cpu

    cpu.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as scratch:
        report(sizes, Path(scratch))
    dist.destroy_process_group()


def report(sizes: argparse.Namespace, folder: Path) -> None:
    """Print the table."""
    print("| | rank | seconds | collectives | KB sent | KB received |\n|---|---|---|---|---|---|", flush=True)
    for name, ranks, work in phases(sizes, folder):
        profiler = cProfile.Profile()
        with profiler if sizes.profile else contextlib.nullcontext():
            start = time.process_time()
            work()
            seconds = time.process_time() - start
        collectives, sent, received = ranks.counts
        rank = "first" if ranks.is_first else "another"
        numbers = f"{seconds:.3f} | {collectives} | {sent / 1e3:,.1f} | {received / 1e3:,.1f}"
        print(f"| {name} | {rank} | {numbers} |", flush=True)
        if sizes.profile:
            pstats.Stats(profiler).sort_stats("cumulative").print_stats(25)


if __name__ == "__main__":
    main()
