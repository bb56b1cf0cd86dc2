"""What a run writes: the hooks that tell the recorder of ``monitor`` what ``megatron.training`` does, and that have its
text and its writers say what optimizers do."""

from __future__ import annotations

import inspect
import resource
import sys
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_muon._patching import Original, Patches
from megatron_muon.agree import Ranks
from megatron_muon.errors import ConfigError
from megatron_muon.monitor import sources
from megatron_muon.monitor.recorder import Recorder, Stopwatch
from megatron_muon.plugin.arguments import given_flags
from megatron_muon.plugin.canonical_state import is_canonical
from megatron_muon.plugin.environment import versions
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.optimizer_state import has_parts

if TYPE_CHECKING:
    import torch

_TRAINING = "megatron.training.training"

PATCHES = Patches()
"""They record a run of ``megatron.training.pretrain`` when ``--muon-log-jsonl`` names a file, on the last rank alone.

Optimizers are heard without the file, too.
"""

_stepped = sources.SteppedSources()


def watch(optimizer: Any, source: sources.Source) -> None:
    """Have Megatron's log say what ``source`` says about ``optimizer``, whenever that has stepped.

    Call it on the last rank of the optimizer's model: that is the one that Megatron's text and writers are on.
    """
    _stepped.watch(optimizer, source)


class _TimedTimer:
    """Megatron's timer of the optimizer step, and a stopwatch that runs with it."""

    def __init__(self, timer: Any, stopwatch: Stopwatch) -> None:
        self._timer = timer
        self._stopwatch = stopwatch

    def start(self, *args: Any, **kwargs: Any) -> None:
        self._timer.start(*args, **kwargs)
        self._stopwatch.start()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        self._stopwatch.stop()
        self._timer.stop(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._timer, name)


@dataclass
class _Run:
    """What the functions around Megatron's share."""

    recorder: Recorder | None = None  # of the training in progress
    is_training: bool = False  # in Megatron's loop
    endings: weakref.WeakKeyDictionary[Any, weakref.WeakMethod[Any]] = field(default_factory=weakref.WeakKeyDictionary)
    routes: weakref.WeakKeyDictionary[Any, Mapping[str, str]] = field(default_factory=weakref.WeakKeyDictionary)
    evaluated: list[dict[str, torch.Tensor]] = field(default_factory=list)  # of the evaluation in progress


_run = _Run()


def note_routes(optimizer: Any, routes: Mapping[str, str]) -> None:
    """Have records say who updates which weights of a model, in words by class."""
    _run.routes[optimizer] = routes


def at_end(optimizer: Any, method: Callable[[], None]) -> None:
    """Call a method after the last step of each training of ``optimizer`` in Megatron's loop; nothing is kept alive."""
    _run.endings[optimizer] = weakref.WeakMethod(method)


def recorder() -> Recorder | None:
    """Of the training that is in progress in Megatron's loop; None without, and on ranks that do not write."""
    return _run.recorder if _run.is_training else None


def is_training() -> bool:
    """Whether Megatron's loop is in progress; the same on all ranks of the run."""
    return _run.is_training


def iteration() -> int | None:
    """The number of Megatron's iteration that is in progress; None in other loops."""
    return _megatron_args().curr_iteration + 1 if _run.is_training else None


def _end(optimizer: Any) -> None:
    """On all ranks alike: optimizers that others have dropped may be alive on some, and are not asked."""
    infos = getattr(optimizer, "module_infos", None)
    for each in [optimizer] if infos is None else [info.optimizer for info in infos.values()]:
        ending = None if each is None else _run.endings.get(each)
        if ending is not None and (method := ending()) is not None:
            method()


def _is_agreed(error: SystemExit) -> bool:
    """Whether Megatron's loop itself exits, as it does on all ranks at once, and not what it calls."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_name == "train"


def _given(original: Original, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call, by name."""
    return inspect.signature(original).bind(*args, **kwargs).arguments


@PATCHES.around(f"{_TRAINING}:train", "--muon-log-jsonl: the file is begun, or cut to the iteration that is resumed")
def _train(original: Original, *args: Any, **kwargs: Any) -> Any:
    optimizer = _given(original, args, kwargs).get("optimizer")
    _refuse_other_muon(optimizer)
    _run.recorder = _recorder()
    _stepped.take()  # steps of other loops
    _run.is_training = True
    try:
        result = original(*args, **kwargs)
        _end(optimizer)
    except SystemExit as error:  # --exit-interval, --exit-duration-in-mins, a signal
        if _is_agreed(error):
            _end(optimizer)
        raise
    finally:
        _run.is_training = False
    return result


@PATCHES.around(
    f"{_TRAINING}:training_log", "--muon-log-jsonl: losses and times of logged iterations; and lines in the log"
)
def _training_log(original: Original, *args: Any, **kwargs: Any) -> Any:
    values = _given(original, args, kwargs)
    iteration = values["iteration"]
    interval = _before_log(values)
    result = original(*args, **kwargs)
    said = _stepped.take()
    if _is_logged(values):
        lines, record = sources.report(said, iteration)
        for line in lines:
            print(f" {line}", flush=True)
        _after_log(values, interval, record)
    if said:
        _to_writers(said, iteration)
    return result


def _before_log(values: dict[str, Any]) -> float:
    """Take note of an iteration; seconds of the interval that is about to be logged, 0 if it is not or not here."""
    if _run.recorder is None:
        return 0.0
    _run.recorder.add(values["loss_dict"], bool(values["skipped_iter"]))
    if not _is_logged(values):
        return 0.0
    # Megatron is about to read this timer in the same way, with the same wait for the device.
    seconds: float = _global_vars().get_timers()("interval-time").elapsed(reset=False)
    return seconds


def _after_log(values: dict[str, Any], interval: float, record: dict[str, Any]) -> None:
    if _run.recorder is None:
        return
    _run.recorder.log(
        values["iteration"],
        interval,
        interval_restarts=not values.get("is_first_iteration", False),
        learning_rate=values["learning_rate"],
        grad_norm=values["grad_norm"],
        consumed_samples=_megatron_args().consumed_train_samples,
        peak_memory_bytes=_peak_memory(),
        **record,
    )


@PATCHES.around(
    f"{_TRAINING}:evaluate", "--muon-log-jsonl: the losses of an evaluation, which its caller does not return"
)
def _evaluate(original: Original, *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    if _run.recorder is not None and result[0]:
        _run.evaluated.append(result[0])
    return result


@PATCHES.around(
    f"{_TRAINING}:evaluate_and_print_results",
    "--muon-log-jsonl: the iteration and data set of an evaluation, which evaluate() is not told",
)
def _evaluate_and_print_results(original: Original, *args: Any, **kwargs: Any) -> Any:
    _run.evaluated.clear()
    result = original(*args, **kwargs)
    if _run.recorder is not None:
        values = _given(original, args, kwargs)
        for name, losses in zip(_set_names(values["prefix"]), _run.evaluated, strict=False):
            # Megatron has printed these numbers, so they are on the host's side already.
            scalars = {key: value.item() for key, value in losses.items()}
            _run.recorder.write("valid", values["iteration"], set=name, losses=scalars)
    return result


def _set_names(prefix: str) -> list[str]:
    kind = "test" if prefix.endswith("test set") else "validation"
    if not _megatron_args().multiple_validation_sets:
        return [kind]
    names = _megatron_args().validation_set_names or range(len(_run.evaluated))
    return [f"{kind}-{name}" for name in names]


@PATCHES.around(
    "megatron.core.timers:Timers.__call__",
    "--muon-log-jsonl: the time of the optimizer step, which Megatron measures at higher log levels only",
)
def _timers(original: Original, timers: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    timer = original(timers, name, *args, **kwargs)
    if name != "optimizer" or _run.recorder is None:
        return timer
    return _TimedTimer(timer, _run.recorder.stopwatch)


def _refuse_other_muon(optimizer: Any) -> None:
    """Refuse, on every rank, what Megatron-Core has built itself under a name of ours: nothing else would say so."""
    name = getattr(getattr(optimizer, "config", None), "optimizer", None)
    if is_ours(name) and not has_parts(optimizer) and not is_canonical(optimizer):
        raise ConfigError(
            f"--optimizer {name} was built before megatron_muon.install(), by Megatron-Core itself. Call "
            "megatron_muon.install() before the model is built."
        )


def _global_vars() -> Any:
    return sys.modules["megatron.training.global_vars"]


def _megatron_args() -> Any:
    return _global_vars().get_args()


def _is_logged(values: dict[str, Any]) -> bool:
    """Whether Megatron writes its line in a call with these arguments: it has waited for the device then."""
    is_first: bool = values.get("is_first_iteration", False)
    return is_first or values["iteration"] % _megatron_args().log_interval == 0


def _to_writers(said: list[sources.Source], iteration: int) -> None:
    if iteration % _megatron_args().tensorboard_log_interval == 0:
        to_writers(lambda: sources.scalars(said, iteration), iteration)


def to_writers(scalars: Callable[[], Mapping[str, float]], iteration: int) -> None:
    """Give points of curves to Megatron's writers, which are on the last rank, if at all.

    Args:
        scalars: asked only if there is a writer.
        iteration: of the points.
    """
    module = sys.modules.get("megatron.training.global_vars")
    if module is None:  # in other loops
        return
    tensorboard, wandb = module.get_tensorboard_writer(), module.get_wandb_writer()
    values = scalars() if tensorboard or wandb else {}
    if tensorboard:
        for name, value in values.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb and getattr(wandb, "run", wandb) is not None:  # it is finished when Megatron exits
        wandb.log(values, iteration)


def _recorder() -> Recorder | None:
    """What records the training that begins, or None on ranks that do not write and without the flag."""
    import torch

    args = _megatron_args()
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    file = getattr(args, "muon_log_jsonl", "")  # arguments that were read before install() have no flags of ours
    if not file:
        return None
    flags = given_flags(args)
    return Ranks.of_world().together(lambda: begin(file, args.iteration, args.train_iters, flags) if is_last else None)


def begin(
    file: str, iteration: int, train_iters: int | None, flags: Mapping[str, Any], *, beside: bool = False
) -> Recorder:
    """Begin a part of a record, on the rank that writes.

    Args:
        file: of ``--muon-log-jsonl``.
        iteration: that the part starts from.
        train_iters: of the run; None if nobody knows.
        flags: those that are not default, with their values.
        beside: see :class:`Recorder`.

    Raises:
        ConfigError: if the file cannot be written.
    """
    import torch

    header = {
        "train_iters": train_iters,
        "world_size": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "device": "cuda" if torch.cuda.is_initialized() else "cpu",
        "versions": versions(),
        "flags": flags,
        "routes": {name: words for routes in _run.routes.values() for name, words in routes.items()},
    }
    try:
        return Recorder(file, iteration, header, beside=beside)
    except OSError as error:
        raise ConfigError(f"--muon-log-jsonl {file} cannot be written: {error}. Give another file.") from error


def _peak_memory() -> int:
    """Bytes: allocated on the GPU, or of the process where there is none."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
