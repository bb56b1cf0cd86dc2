"""MLPs, experts and what routes tokens to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_muon.config import MuonConfig
from megatron_muon.routing.layout import MatrixLayout, Section
from megatron_muon.routing.rules.linear import UNKNOWN_PART, layer_of, matrices_in, matrices_of
from megatron_muon.routing.treatment import WHOLE_MATRIX, Treatment, WeightTreatment, fused, rule


@rule("MLP")
def mlp(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """``linear_fc1`` of a gated MLP, dense or one expert's: a rank's gate rows, then its up rows."""
    if getattr(module.config, "gated_linear_unit", False):
        yield from _gate_and_up(module.linear_fc1, None, options)


@rule("SharedExpertMLP")
def shared_experts(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """As :func:`mlp`; the grouped kernel may take gate and up rows in turns."""
    config = module.config
    if getattr(config, "gated_linear_unit", False):
        grouped = getattr(config, "use_grouped_gemm_for_shared_expert", False)
        interleave = config.moe_shared_expert_glu_interleave_size if grouped else None
        yield from _gate_and_up(module.linear_fc1, interleave, options)


@rule("TEGroupedMLP")
def grouped_experts(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """Experts of a grouped layer: ``weight0``, ``weight1``, ... of (rows, columns) each, or one 3-D ``weight``."""
    config = module.config
    if getattr(config, "gated_linear_unit", False):
        yield from _gate_and_up(module.linear_fc1, getattr(config, "moe_mlp_glu_interleave_size", None), options)
    for layer in (module.linear_fc1, module.linear_fc2):
        for weight in matrices_of(layer_of(layer)):
            if weight.dim() == 3:
                yield weight, Treatment("experts", WHOLE_MATRIX, {WHOLE_MATRIX: MatrixLayout("whole", stacked=True)})


def _gate_and_up(layer: Any, interleave: int | None, options: MuonConfig) -> Iterator[WeightTreatment]:
    weights = matrices_of(layer_of(layer))
    if not weights:
        yield from ((param, UNKNOWN_PART) for param in matrices_in(layer))
    for weight in weights:
        rows = weight.size(-2)
        half = interleave or rows // 2
        treatment = fused(
            "glu",
            weight,
            options.glu,
            [Section("gate", half), Section("up", half)],
            option="glu",
            rows=rows - rows % (2 * half) if half else -1,
            source=f"gate and up in turns of {half} rows" if interleave else "a gate and an up half",
        )
        yield weight, treatment


@rule("Router")
def router(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """The router: (experts, hidden), whole on every rank."""
    choice = WHOLE_MATRIX if options.router == "muon" else options.router
    yield module.weight, Treatment("router", choice, reason=f"--muon-router {options.router}")


@rule("HyperConnectionModule")
def hyper_connection(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """``mapping_proj`` of hyper-connections: n rows to read, n to write, n x n to mix the residual streams."""
    n, weight = module.n, module.mapping_proj.weight
    sections = [Section("pre", n), Section("post", n), Section("res", n * n)]
    source = f"n {n} residual streams"
    yield weight, fused("hyper_connection", weight, WHOLE_MATRIX, sections, rows=n * n + 2 * n, source=source)
