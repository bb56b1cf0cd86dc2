"""What a run writes: the hooks that tell the recorder of ``monitor`` what ``megatron.training`` does, and that have its
text and its writers say what optimizers do."""

from __future__ import annotations

import functools
import inspect
import resource
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_muon._patching import Patch
from megatron_muon.agree import Ranks
from megatron_muon.errors import ConfigError
from megatron_muon.monitor import sources
from megatron_muon.monitor.recorder import Recorder, Stopwatch
from megatron_muon.plugin.canonical_state import is_canonical
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.optimizer_state import has_parts

if TYPE_CHECKING:
    import torch

__all__ = ["patches", "watch"]

_stepped = sources.Stepped()


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


class _Hooks:
    """The functions around Megatron's. One object for all, as they share the recorder and the evaluation's context."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.evaluated: list[dict[str, torch.Tensor]] = []

    def around_train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def train(*args: Any, **kwargs: Any) -> Any:
            _refuse_other_muon(signature.bind(*args, **kwargs).arguments.get("optimizer"))
            self.recorder = _recorder()
            _stepped.take()  # steps of other loops
            return original(*args, **kwargs)

        return train

    def around_training_log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def training_log(*args: Any, **kwargs: Any) -> Any:
            values = signature.bind(*args, **kwargs).arguments
            iteration = values["iteration"]
            interval = self._before_log(values)
            result = original(*args, **kwargs)
            said = _stepped.take()
            if _is_logged(values):
                lines, record = sources.report(said, iteration)
                for line in lines:
                    print(f" {line}", flush=True)
                self._after_log(values, interval, record)
            if said:
                _to_writers(said, iteration)
            return result

        return training_log

    def _before_log(self, values: dict[str, Any]) -> float:
        """Take note of an iteration; seconds of the interval that is about to be logged, 0 if it is not or not here."""
        if self.recorder is None:
            return 0.0
        self.recorder.add(values["loss_dict"], bool(values["skipped_iter"]))
        if not _is_logged(values):
            return 0.0
        # Megatron is about to read this timer in the same way, with the same wait for the device.
        seconds: float = _megatron_timers()("interval-time").elapsed(reset=False)
        return seconds

    def _after_log(self, values: dict[str, Any], interval: float, record: dict[str, Any]) -> None:
        if self.recorder is None:
            return
        self.recorder.log(
            values["iteration"],
            interval,
            interval_restarts=not values.get("is_first_iteration", False),
            learning_rate=values["learning_rate"],
            grad_norm=values["grad_norm"],
            consumed_samples=_megatron_args().consumed_train_samples,
            peak_memory_bytes=_peak_memory(),
            **record,
        )

    def around_evaluate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.recorder is not None and result[0]:
                self.evaluated.append(result[0])
            return result

        return evaluate

    def around_evaluate_and_print_results(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def evaluate_and_print_results(*args: Any, **kwargs: Any) -> Any:
            self.evaluated.clear()
            result = original(*args, **kwargs)
            if self.recorder is not None:
                values = signature.bind(*args, **kwargs).arguments
                for name, losses in zip(self._set_names(values["prefix"]), self.evaluated, strict=False):
                    # Megatron has printed these numbers, so they are on the host's side already.
                    scalars = {key: value.item() for key, value in losses.items()}
                    self.recorder.write("valid", values["iteration"], set=name, losses=scalars)
            return result

        return evaluate_and_print_results

    def _set_names(self, prefix: str) -> list[str]:
        kind = "test" if prefix.endswith("test set") else "validation"
        if not _megatron_args().multiple_validation_sets:
            return [kind]
        names = _megatron_args().validation_set_names or range(len(self.evaluated))
        return [f"{kind}-{name}" for name in names]

    def around_timers(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(timers: Any, name: str, *args: Any, **kwargs: Any) -> Any:
            timer = original(timers, name, *args, **kwargs)
            if name != "optimizer" or self.recorder is None:
                return timer
            return _TimedTimer(timer, self.recorder.stopwatch)

        return call


def patches() -> list[Patch]:
    """The hooks that record a run of ``megatron.training.pretrain`` when ``--muon-log-jsonl`` names a file.

    Only the last rank writes, so on a cluster the file is on its machine. Optimizers are heard without the file too.
    """
    hooks = _Hooks()
    training = "megatron.training.training"
    return [
        Patch(f"{training}:train", hooks.around_train, "the file is begun, or cut to the resumed iteration"),
        Patch(
            f"{training}:training_log",
            hooks.around_training_log,
            "losses and times of logged iterations, and what optimizers say",
        ),
        Patch(f"{training}:evaluate", hooks.around_evaluate, "the losses of an evaluation"),
        Patch(
            f"{training}:evaluate_and_print_results",
            hooks.around_evaluate_and_print_results,
            "the iteration and data set of an evaluation",
        ),
        Patch("megatron.core.timers:Timers.__call__", hooks.around_timers, "the time of the optimizer step"),
    ]


def _refuse_other_muon(optimizer: Any) -> None:
    """Refuse one that Megatron-Core has built itself under a name of ours: nothing else would ever say so.

    Raises:
        ConfigError: on every rank, since all have built it in the same way.
    """
    name = getattr(getattr(optimizer, "config", None), "optimizer", None)
    if is_ours(name) and not has_parts(optimizer) and not is_canonical(optimizer):
        raise ConfigError(
            f"--optimizer {name} was built before megatron_muon.install(), by Megatron-Core itself. Call "
            "megatron_muon.install() before the model is built."
        )


def _megatron_args() -> Any:
    return sys.modules["megatron.training.global_vars"].get_args()


def _megatron_timers() -> Any:
    return sys.modules["megatron.training.global_vars"].get_timers()


def _is_logged(values: dict[str, Any]) -> bool:
    """Whether Megatron writes its line in a call with these arguments: it has waited for the device then."""
    is_first: bool = values.get("is_first_iteration", False)
    return is_first or values["iteration"] % _megatron_args().log_interval == 0


def _to_writers(said: list[sources.Source], iteration: int) -> None:
    """Megatron's, which are on the last rank, if at all."""
    module = sys.modules["megatron.training.global_vars"]
    tensorboard, wandb = module.get_tensorboard_writer(), module.get_wandb_writer()
    if not (tensorboard or wandb) or iteration % _megatron_args().tensorboard_log_interval:
        return
    values = sources.scalars(said, iteration)
    if tensorboard:
        for name, value in values.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(values, iteration)


def _recorder() -> Recorder | None:
    """What records the training that begins, or None on ranks that do not write and without the flag."""
    import torch

    args = _megatron_args()
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    file = getattr(args, "muon_log_jsonl", "")  # arguments that were read before install() have no flags of ours
    if not file:
        return None

    def begin() -> Recorder | None:
        header = {
            "train_iters": args.train_iters,
            "world_size": args.world_size,
            "device": "cuda" if torch.cuda.is_initialized() else "cpu",
        }
        try:
            return Recorder(file, args.iteration, header) if is_last else None
        except OSError as error:
            raise ConfigError(f"--muon-log-jsonl {file} cannot be written: {error}. Give another file.") from error

    return Ranks.of_world().together(begin)


def _peak_memory() -> int:
    """Bytes: allocated on the GPU, or of the process where there is none."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
