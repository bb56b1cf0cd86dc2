"""Which optimizers Megatron's log is about, and the names of their numbers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from megatron_muon.monitor.sources import Report, SteppedSources, report, scalars


class Optimizer:
    def prepare_grads(self) -> str:
        return "prepared"


class Temperature:
    """A source."""

    def __init__(self, value: float, title: str = "Temperature") -> None:
        self.title, self.prefix, self.value = title, title.lower(), value

    def report(self, iteration: int) -> Report:
        return Report(f"{self.value} degrees", {f"{self.prefix}_degrees": self.value})

    def scalars(self, iteration: int) -> dict[str, float]:
        return {"degrees": self.value + iteration}


def watched(stepped: SteppedSources, *args: Any) -> Any:
    optimizer = Optimizer()
    stepped.watch(optimizer, Temperature(*args))
    return optimizer


def test_those_that_have_stepped() -> None:
    stepped = SteppedSources()
    actor, critic = watched(stepped, 1.0), watched(stepped, 2.0)
    assert stepped.take() == []
    assert critic.prepare_grads() == "prepared"
    assert [source.value for source in stepped.take()] == [2.0]
    assert stepped.take() == []
    critic.prepare_grads()
    actor.prepare_grads()
    actor.prepare_grads()
    assert [source.value for source in stepped.take()] == [1.0, 2.0]


def test_an_optimizer_that_is_dropped_is_forgotten() -> None:
    stepped = SteppedSources()
    optimizer = watched(stepped, 1.0)
    gone = weakref.ref(optimizer)
    optimizer.prepare_grads()
    del optimizer
    gc.collect()
    assert gone() is None and stepped.take() == []


def test_the_same_names_get_numbers() -> None:
    sources = [Temperature(1.0), Temperature(5.0, "Pressure"), Temperature(2.0)]
    lines, record = report(sources, 7)
    assert lines == [
        "Temperature after iteration 7: 1.0 degrees",
        "Pressure after iteration 7: 5.0 degrees",
        "Temperature 2 after iteration 7: 2.0 degrees",
    ]
    assert record == {"temperature_degrees": 1.0, "pressure_degrees": 5.0, "temperature_degrees_2": 2.0}
    assert scalars(sources, 7) == {"temperature/degrees": 8.0, "pressure/degrees": 12.0, "temperature-2/degrees": 9.0}
