"""``--muon-log-interval``, ``--muon-alarm`` and ``--muon-check-replicas-interval``: what is measured when, and told.

Steps are counted as Muon's state counts them, so that a resumed run measures in the same steps, and one that was left
out for NaN is made up for. All ranks of a model know the count by the exchange that begins each step
(:mod:`megatron_muon.plugin.nonfinite`), those without weights of Muon's too. A measured step leaves its numbers on the
device. They are brought together, judged and written when the next step begins: the host has waited for the device
there, and nothing has changed yet, so that an alarm can stop the run with the weights and the state of a finished step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from megatron_muon.agree import Ranks
from megatron_muon.config import MuonConfig, flag
from megatron_muon.monitor import summary
from megatron_muon.monitor.alarms import Alarm, Alarms
from megatron_muon.monitor.recorder import Recorder
from megatron_muon.monitor.schema import TIMES
from megatron_muon.monitor.table import Table, class_of, layer_of
from megatron_muon.optimizers.handled import STEP
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.probe import Probe
from megatron_muon.plugin import recording
from megatron_muon.plugin.optimizer_state import leaves, param_states
from megatron_muon.plugin.qk_clip import clip_of
from megatron_muon.plugin.replicas import check_replicas
from megatron_muon.plugin.tables import Numbers, Rows, defects_of, numbered
from megatron_muon.refusals.rule import flag_of
from megatron_muon.routing.report import Route

_RATES = ("lr", "weight_decay", "scalar_lr")
_NONE = float("-inf")
"""Of a rank that has no such number, where the largest counts."""

_OWN_RECORDS: WeakValueDictionary[str, Recorder] = WeakValueDictionary()
"""By their files, of optimizers in loops other than Megatron's, while these live."""


@dataclass(frozen=True)
class _Measured:
    """A step whose numbers are still to be brought together.

    Attributes:
        iteration: of the step.
        largest: rates in force, largest logit and number of clipped heads: float64, -inf where there is none.
    """

    iteration: int
    largest: torch.Tensor


class Watching:
    """Watches the steps of a model's optimizer; all ranks of the model must make one, and call it alike.

    Args:
        optimizer: Megatron-Core's, of the model.
        model_chunks: of the model on this rank.
        groups: the model's.
        ranks: the model's.
        options: of the model.
        routes: of all weights of the model, see :class:`Rows`.
        device: of the model.

    Attributes:
        is_known_to_all: whether each rank can count steps by itself.
    """

    def __init__(
        self,
        optimizer: Any,
        model_chunks: Sequence[torch.nn.Module],
        groups: Any,
        ranks: Ranks,
        options: MuonConfig,
        routes: Sequence[tuple[str, Route]],
        device: torch.device,
    ) -> None:
        self._optimizer, self._chunks, self._groups, self._ranks = optimizer, model_chunks, groups, ranks
        self._options, self._device = options, device
        inners = [leaf.optimizer for leaf, _ in leaves(optimizer)]
        self._muons = [inner for inner in inners if isinstance(inner, Muon)]
        self._others = [inner for inner in inners if not isinstance(inner, Muon)]
        self._writes = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        found = ranks.gather(lambda: (any(group["params"] for group in self._groups_of_muon()), self._writes))
        self.is_known_to_all = all(has_weights for has_weights, _ in found)
        if ranks.is_first and options.log_interval and not any(writes for _, writes in found):
            print(
                "megatron_muon: the last rank of the run, which writes records and curves, has no part of this model: "
                f"numbers of its steps are judged, and printed with {flag('log_console')}, but not written",
                flush=True,
            )
        experts = getattr(groups, "ep", None)
        names = {param: name for chunk in model_chunks for name, param in numbered(chunk, experts)}
        held = [each for each in param_states(optimizer, refuse=False) if isinstance(each.inner, Muon)]
        weights = [(names[each.param], each.key) for each in held if each.key is not None]
        self._rows = Rows(routes, weights, device)
        self._alarms = Alarms(defects=defects_of(routes, options))
        self._probes = [Probe() for _ in self._muons] if options.log_interval else []
        for muon, probe in zip(self._muons, self._probes, strict=False):
            muon.probe = probe
        self._own_record: Recorder | None = None  # where Megatron's loop keeps none
        self._has_begun = False
        self._number = 0  # of the step that comes
        self._compared = -1  # steps that had been made when replicas were compared last
        self._measured: _Measured | None = None
        recording.at_end(optimizer, self.finish)

    def _groups_of_muon(self) -> list[dict[str, Any]]:
        return [group for muon in self._muons for group in muon.param_groups]

    @property
    def count(self) -> int:
        """Steps that Muon has made, as far as this rank knows."""
        return max((group[STEP] for group in self._groups_of_muon()), default=0)

    def begin(self, count: int) -> None:
        """Before a step: tell of the last one, if it was measured. The host has waited for the device.

        Args:
            count: steps that Muon has made on any rank.

        Raises:
            RuntimeError: on all ranks, for alarms with ``--muon-alarm stop``.
            ConfigError: on all ranks, in the first step, for a record that cannot be begun.
        """
        self._number = count + 1
        if not self._has_begun:
            self._has_begun = True
            self._begin_record(count)
        found = self._tell()
        interval = self._options.check_replicas_interval
        if interval and count and count % interval == 0 and count != self._compared:
            self._compared = count
            found += self._compare()
        if found and self._options.alarm == "stop":
            raise RuntimeError(
                f"Muon stopped by {flag('alarm')} stop, before step {self._number} has changed anything: weights and "
                "state are those of a finished step, and can be saved. " + " ".join(alarm.text for alarm in found)
            )

    def step(self, update: Callable[[], Any]) -> Any:
        """Run the optimizer's ``step_with_ready_grads``, measured if it is due."""
        interval = self._options.log_interval
        # The first one, too: a rate that is far too high for the weights shows there, and they have grown by the next.
        is_due = bool(interval) and (self._number % interval == 0 or self._number == 1)
        for probe in self._probes:
            probe.is_due, probe.is_next_due = is_due, (self._number + 1) % interval == 0
        largest = self._largest() if is_due else None
        result = update()
        if largest is not None:
            largest = torch.cat([largest, self._logits()])
            self._measured = _Measured(recording.iteration() or self._number, largest)
        return result

    def finish(self) -> None:
        """After the last step of a training, on all ranks: tell of it; nothing is left to be stopped."""
        self._ranks.together(lambda: None)
        self._tell()

    def _largest(self) -> torch.Tensor:
        """:data:`_RATES`: the scheduler changes them after the step."""
        others = [group for inner in self._others for group in inner.param_groups]
        found = []
        for groups, name in ((self._groups_of_muon(), "lr"), (self._groups_of_muon(), "weight_decay"), (others, "lr")):
            values = [group[name] for group in groups if group["params"]]
            each = [value.double() if isinstance(value, torch.Tensor) else self._full(value) for value in values]
            found.append(torch.stack([self._full(_NONE), *(its.reshape(()).to(self._device) for its in each)]).max())
        return torch.stack(found)

    def _logits(self) -> torch.Tensor:
        clip = clip_of(self._chunks)
        if clip is None:
            return torch.stack([self._full(_NONE)] * 2)
        return torch.stack([clip.max_logit, clip.heads_clipped if clip.settings.clip else self._full(_NONE)]).double()

    def _full(self, value: float) -> torch.Tensor:
        """A scalar by a kernel that takes the number along: nobody waits for a copy."""
        return torch.full((), value, dtype=torch.float64, device=self._device)

    def _tell(self) -> list[Alarm]:
        """Bring the numbers of a measured step together, write them, and tell of alarms: these."""
        measured, self._measured = self._measured, None
        if measured is None:
            return []
        samples = [sample for probe in self._probes for sample in probe.take()]
        parts = [probe.times() for probe in self._probes]
        times = {name: sum(part[name] for part in parts) for name in TIMES}
        numbers, spreads, rest = self._rows.together(self._rows.local(samples), times, measured.largest, self._ranks)
        known = [None if value == _NONE else value for value in rest]
        rates = {name: value for name, value in zip(_RATES, known, strict=False) if value is not None}
        heads = None if known[4] is None else int(known[4])
        table = Table(measured.iteration, numbers.rows(), spreads, rates, known[3], heads)
        alarms = [] if self._options.alarm == "off" else self._alarms.examine(table)
        self._write(table, numbers)
        self._warn(alarms)
        return alarms

    def _write(self, table: Table, numbers: Numbers) -> None:
        prints = self._ranks.is_last and self._options.log_console
        if not (prints or self._writes):
            return
        classes = numbers.by(class_of).rows()
        if prints:
            print(f" {summary.line(table, classes)}", flush=True)
        if self._writes:
            layers = numbers.by(layer_of).rows() if self._options.log_per_layer else {}
            if (record := self._record()) is not None:
                record.write("muon", table.iteration, **summary.record(table, classes, layers))
            recording.to_writers(lambda: summary.scalars(table, classes, layers), table.iteration)

    def _compare(self) -> list[Alarm]:
        """Compare replicas, and tell of those that differ. What is compared is gathered by now, and waited for."""
        differing = check_replicas(self._optimizer, self._chunks, self._groups, self._ranks)
        step = self._number - 1
        iteration = recording.iteration()
        alarms = self._alarms.compare(step if iteration is None else iteration - 1, differing)
        self._warn(alarms)
        return alarms

    def _warn(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            if self._ranks.is_first:
                print(f"megatron_muon: ALARM {alarm.text}", flush=True)
            if self._writes and (record := self._record()) is not None:
                its = {name: getattr(alarm, name) for name in ("since", "weights", "count", "value", "limit", "text")}
                record.write("alarm", alarm.iteration, alarm=alarm.name, **its)

    def _begin_record(self, count: int) -> None:
        """In a loop that is not Megatron's, begin a record that has what is told here."""
        file = self._options.log_jsonl
        if not file or recording.is_training():
            return

        def begin() -> None:
            if self._writes:
                flags = {flag_of(name): value for name, value in self._options.as_settings().items()}
                own = {flag_of(name): value for name, value in MuonConfig().as_settings().items()}
                given = {name: value for name, value in flags.items() if value != own[name]}
                # An actor's and a critic's begin at different times: neither is to remove what the other has written.
                beside = not count and file in _OWN_RECORDS
                self._own_record = _OWN_RECORDS[file] = recording.begin(file, count, None, given, beside=beside)

        self._ranks.together(begin)
        if self._ranks.is_first:
            print(
                f"megatron_muon: {flag('log_jsonl')} {file} has what is measured of Muon and alarms, and no losses: "
                "this training loop is not Megatron's, which is the one that tells them",
                flush=True,
            )

    def _record(self) -> Recorder | None:
        return recording.recorder() or self._own_record
