"""What does it bring, and cost, to keep the singular values of attention's weights at 1?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tools.results.model import HEAD, Training
from tools.results.records import Context, Record, Sweep
from tools.results.report import (
    Report,
    cut,
    draw_losses,
    finish,
    loss_table,
    number_list,
    rate_text,
    sizes,
    style,
    table,
)
from tools.results.sphere import SCALAR_RATE, findings, ratios, times_table

TITLE = "Attention on the Stiefel manifold"
WIDTH = 64
LAYERS = 3
STEPS = 150
RATES = [2.0**exponent for exponent in range(-7, -2)]
QUICK_RATES = [2.0**-7]

RULES = ("*linear_qkv*=stiefel", "*linear_proj*=stiefel")
SOLVERS = ("admm", "dual_ascent", "fixed_point")
SWEPT = "Stiefel, admm"

CONTESTANTS: dict[str, dict[str, Any]] = {
    "Muon": {"optimizer": "muon", "options": {}},
    "Adam": {"optimizer": "adam"},
    **{
        f"Stiefel, {solver}": {
            "optimizer": "stiefel_muon",
            "options": {"muon_param_rule": RULES, "muon_stiefel_solver": solver},
        }
        for solver in SOLVERS
    },
}


def run(context: Context) -> Report:
    """Sweep the rate of Muon, Adam and Stiefel Muon; the other solvers have the best rate of the first one."""
    base = {"width": 32 if context.quick else WIDTH, "layers": LAYERS, "rate": 0.0}
    found: dict[str, Sweep] = {}
    for name, values in CONTESTANTS.items():
        setting = context.setting(STEPS, **base, **_with_common_options(values))
        if name.startswith("Stiefel") and name != SWEPT:
            rate = found[SWEPT].best
            found[name] = Sweep({rate: context.records(replace(setting, rate=rate), watch_weights)})
        else:
            found[name] = context.sweep(setting, QUICK_RATES if context.quick else RATES, watch_weights)
    best = {name: sweep.records[sweep.best] for name, sweep in found.items()}
    swept = {name: sweep.losses for name, sweep in found.items() if len(sweep.records) > 1 or context.quick}
    return Report(
        name="stiefel",
        title=TITLE,
        asked=(
            "`--optimizer stiefel_muon` with `--muon-param-rule '*linear_qkv*=stiefel'` and the same for "
            "`*linear_proj*` keeps q, k, v and the output projection of every attention at singular values of 1, by "
            "the steepest step along the manifold, with each of its solvers; the other matrices are Muon's. Against "
            "Muon on all of them and Adam on everything, each at its best rate. Muon's updates have the same spectral "
            "norm as the manifold's (`--muon-scale-mode unit_rms_norm`; attention's matrices are square)."
        ),
        settings=f"Width {base['width']}, {LAYERS} layers; what Adam updates beside Muon has rate "
        f"{rate_text(SCALAR_RATE)} everywhere. {sizes(setting, context)}",
        tables=[
            ("Final validation loss by peak learning rate of the matrices:", loss_table("", swept)),
            ("At the best rate (of admm for all solvers), and medians of the time of a step:", times_table(found)),
            (
                "At the best rate, over all steps: singular values of attention's matrices, and how far the solver's "
                "direction is from tangent, \\|W^T Phi + Phi^T W\\| / n:",
                _weights_table(best),
            ),
        ],
        findings=[*findings(found), *weight_findings(best)],
        numbers={
            name: {**sweep.as_json(), **ratios(found, "Muon")[name], "weights": asdict(Extremes.of(best[name]))}
            for name, sweep in found.items()
        },
        draw=lambda figure: _draw(figure, swept, best),
    )


def _with_common_options(values: dict[str, Any]) -> dict[str, Any]:
    if values["optimizer"] == "adam":
        return values
    common = {"muon_scale_mode": "unit_rms_norm", "muon_scalar_lr": SCALAR_RATE}
    return {**values, "options": {**common, **values["options"]}}


def attention_matrices(training: Training) -> Iterator[torch.Tensor]:
    """q, k, v and the output projection of every layer."""
    for name, param in training.model.named_parameters():
        if name.endswith("linear_qkv.weight"):
            yield from split(param.detach())
        elif name.endswith("linear_proj.weight"):
            yield param.detach()


def split(weight: torch.Tensor) -> list[torch.Tensor]:
    """q, k and v of a fused weight, whose rows are those of q, k and v of each head in turn."""
    rows = weight.view(-1, 3, HEAD, weight.size(1))
    return [rows[:, number].reshape(-1, weight.size(1)) for number in range(3)]


def watch_weights(training: Training, extra: dict[str, Any]) -> None:
    """Keep the smallest and the largest singular value after the step, and the largest tangency in it."""
    values = torch.linalg.svdvals(torch.stack(list(attention_matrices(training))))
    extra.setdefault("smallest", []).append(float(values.min()))
    extra.setdefault("largest", []).append(float(values.max()))
    parts = getattr(training.optimizer, "chained_optimizers", [training.optimizer])
    variants = [getattr(part.optimizer, "variant", None) for part in parts]
    found = [float(each) for variant in variants if (each := getattr(variant, "tangency", None)) is not None]
    if found:
        extra.setdefault("tangency", []).append(max(found))


@dataclass(frozen=True)
class Extremes:
    """Of the attention's matrices, over all steps and seeds.

    Attributes:
        smallest: singular value.
        largest: singular value.
        tangency: the largest; None without a manifold.
    """

    smallest: float
    largest: float
    tangency: float | None

    @classmethod
    def of(cls, records: list[Record]) -> Extremes:
        """From what the watch kept."""
        smallest, largest, tangencies = (
            [value for each in records for value in each.extra.get(name, [])]
            for name in ("smallest", "largest", "tangency")
        )
        return cls(min(smallest), max(largest), max(tangencies, default=None))

    @property
    def distance(self) -> float:
        """The largest difference of a singular value from 1."""
        return max(abs(self.smallest - 1), abs(self.largest - 1))


def weight_findings(best: Mapping[str, list[Record]]) -> list[str]:
    """How far singular values are from 1, and directions from tangent."""
    sentences = []
    stiefel = {name: Extremes.of(records) for name, records in best.items() if name.startswith("Stiefel")}
    for name, records in best.items():
        found = Extremes.of(records)
        sentences.append(
            f"{name}: singular values of attention's matrices are between {found.smallest:.4g} and "
            f"{found.largest:.4g} during training."
        )
    farthest = max(each.distance for each in stiefel.values())
    texts = [f"{each.tangency:.2g} with {name.partition(', ')[2]}" for name, each in stiefel.items()]
    sentences.append(
        f"On the manifold they are within {farthest:.2g} of 1. From tangent, the direction is at most "
        f"{number_list(texts)}."
    )
    return sentences


def _weights_table(best: Mapping[str, list[Record]]) -> str:
    rows = []
    for name, records in best.items():
        found = Extremes.of(records)
        tangency = "" if found.tangency is None else f"{found.tangency:.2g}"
        rows.append([name, f"{found.smallest:.5g}", f"{found.largest:.5g}", tangency])
    return table(["", "smallest singular value", "largest", "largest tangency"], rows)


def _draw(figure: Any, losses: Mapping[str, Mapping[float, float]], best: Mapping[str, list[Record]]) -> None:
    left, right = figure.subplots(1, 2)
    draw_losses(left, losses, "Loss by learning rate of the matrices")
    cut(left, losses.values())
    left.set_ylabel("final validation loss (nats a character)")
    for number, name in enumerate(losses):
        extra = best[name][0].extra
        steps = range(1, len(extra["smallest"]) + 1)
        line = {**style(number), "marker": None}
        right.plot(steps, extra["largest"], label=name, **line)
        right.plot(steps, extra["smallest"], **line)
    right.set_xlabel("step")
    finish(right, "Smallest and largest singular value of attention's matrices")
    right.set_yscale("log")
    right.legend(frameon=False, fontsize="small")
