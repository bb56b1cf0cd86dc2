"""Hyperparameter transfer: what was tuned on a small model, for a wider and deeper one (arXiv 2512.05620).

``--muon-transfer 256x4`` says that learning rate, weight decay, eps and initial weights were tuned on a model of hidden
size 256 with 4 layers. With D and L, how many times wider and deeper this model is:

* Muon's matrices: the update has RMS-to-RMS norm 1 (``unit_rms_norm``, or ``spectral_norm``), so that the rate stays;
  eps sqrt(n / m) / L is added to the norm of the m x n matrix that is orthogonalized.
* Adam's matrices, and the output layer: learning rate / D. Adam's eps: / D, and / L within layers; it keeps the D where
  the outputs are as many at every width (the output layer; routers and gates). Tables and vectors keep the rate.
* Residual branches count 1 / L. Instead of a multiplier in the forward pass, which checkpoints and inference would have
  to know of, the layer that ends a branch is itself 1 / L: its initial weights, and its learning rate.
* Weight decay: lambda / D of every weight, times the schedule, whatever its learning rate.
* Initial weights: standard deviation / sqrt(D); of the output layer / D; tables as they are. Zeros at the ends of
  branches: what random ones give falls with the depth, and learning rates would not fit.

Here is the arithmetic; :mod:`megatron_muon.plugin.transfer` applies it in Megatron-Core.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.choices import parse_transfer
from megatron_muon.config import flag
from megatron_muon.errors import ConfigError
from megatron_muon.refusals import TRANSFER, refuse
from megatron_muon.routing.layout import COLUMN_NORM, layout_of
from megatron_muon.routing.layout import TABLE as TABLE_KIND
from megatron_muon.routing.predicate import is_divided, is_vector
from megatron_muon.routing.rules.linear import LORA_FACTOR

__all__ = ["Role", "Transfer", "roles", "scale_initialization"]

TABLE, READOUT, MATRIX, VECTOR, SELECTOR = KINDS = ("table", "readout", "matrix", "vector", "selector")

BASE_ATTRIBUTE = "muon_transfer"
"""Attribute of a model's config that says for which base its initial weights were scaled."""


@dataclass(frozen=True)
class Role:
    """What a weight is in the model, as far as the rule of transfer depends on it.

    Attributes:
        kind: :data:`TABLE` (rows are looked up), :data:`READOUT` (the output layer), :data:`MATRIX`, :data:`VECTOR`,
            :data:`SELECTOR` (a matrix whose number of outputs does not grow with the model: routers, gates).
        in_layer: whether it is in a layer, whose gradients get smaller with the number of layers; not in those of
            multi-token prediction.
        ends_branch: whether what it gives is added to the residual stream.
    """

    kind: str
    in_layer: bool = False
    ends_branch: bool = False


@dataclass(frozen=True)
class Transfer:
    """How many times wider and deeper a model is than the one that was tuned.

    Attributes:
        width: D.
        depth: L.
    """

    width: float
    depth: float

    @classmethod
    def of(cls, base: str, config: Any) -> Transfer:
        """From ``--muon-transfer`` and the config of the whole model (never the layers of a pipeline stage).

        Raises:
            ConfigError: if the config has no hidden size or no number of layers.
        """
        width, depth = _parsed(base)
        for name in ("hidden_size", "num_layers"):
            if not getattr(config, name, None):
                raise ConfigError(
                    f"{flag('transfer')} {base}: the model's config says {name} {getattr(config, name, None)}, so that "
                    "its size cannot be compared with the base's. Set it to that of the whole model."
                )
        return cls(config.hidden_size / width, config.num_layers / depth)

    def rate(self, role: Role) -> float:
        """Factor on Adam's learning rate."""
        factor = 1.0 / self.width if role.kind in (MATRIX, READOUT, SELECTOR) else 1.0
        return factor * self.branch(role)

    def branch(self, role: Role) -> float:
        """Factor on any learning rate: 1 / L of what ends a branch."""
        return 1.0 / self.depth if role.ends_branch else 1.0

    def eps(self, role: Role) -> float:
        """Factor on Adam's eps: 1 / (L x outputs), as gradients are."""
        return (1.0 if role.kind in (READOUT, SELECTOR) else 1.0 / self.width) / self.damping_depth(role)

    def damping_depth(self, role: Role) -> float:
        """The divisor of eps for depth: what ends a branch gets its gradient without the 1 / L of the branch."""
        return self.depth if role.in_layer and not role.ends_branch else 1.0


def _parsed(base: str) -> tuple[int, int]:
    try:
        return parse_transfer(base)
    except (AttributeError, ValueError):
        raise ConfigError(f"{flag('transfer')} {base}: give WIDTHxDEPTH, such as 256x4.") from None


_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")
_BRANCH = re.compile(r"(.*(?:^|\.)layers\.\d+\.(?:self_attention|cross_attention|mlp|mixer))\.")
_MTP = re.compile(r"(?:^|\.)mtp\.layers\.\d+\.")
_ENDS = re.compile(r"\.(?:linear_proj|linear_fc2|out_proj)\.(?:weight|bias)\d*$")


def roles(module: torch.nn.Module, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[Any, Role]:
    """The role of each parameter.

    Args:
        module: a model chunk.
        named_parameters: of it, names in the whole model.

    Raises:
        ConfigError: for a model to which the rule cannot be applied: tied output layers, norms at the end of branches,
            adapters, layers whose last projection is not known.
    """
    named = list(named_parameters)
    _refuse(module, named)
    tables, routers = _tables(module), _routers(module)
    found = {}
    for name, param in named:
        # Multi-token prediction starts a residual stream of its own, of one layer in models of all depths.
        in_layer = _LAYER.search(name) is not None and _MTP.search(name) is None
        ends = in_layer and _ENDS.search(name) is not None
        found[param] = Role(_kind(param, tables, routers), in_layer, ends)
    _check_branches(name for name, _ in named)
    return found


def _kind(param: torch.nn.Parameter, tables: set[torch.Tensor], routers: set[torch.Tensor]) -> str:
    if param in tables:
        return TABLE
    if getattr(param, "is_embedding_or_output_parameter", False):
        return READOUT
    if param.dim() == 2 and param.size(0) == 1 and param.size(1) > 1 and not is_divided(param, 0):
        return SELECTOR  # a gate: one output, but it sums over its inputs
    if param in routers:
        return SELECTOR
    return VECTOR if param.dim() != layout_of(param).dims or is_vector(param) else MATRIX


def _tables(module: torch.nn.Module) -> set[torch.Tensor]:
    tables = (
        submodule
        for submodule in module.modules()
        if isinstance(submodule, torch.nn.Embedding) or type(submodule).__name__ == "VocabParallelEmbedding"
    )
    return {param for table in tables for param in table.parameters(recurse=False)}


def _routers(module: torch.nn.Module) -> set[torch.Tensor]:
    """Weights of routers: (experts, hidden)."""
    routers = (
        submodule for submodule in module.modules() if "Router" in (base.__name__ for base in type(submodule).__mro__)
    )
    return {weight for router in routers if isinstance(weight := getattr(router, "weight", None), torch.nn.Parameter)}


def _refuse(module: torch.nn.Module, named: list[tuple[str, torch.nn.Parameter]]) -> None:
    found = (getattr(getattr(submodule, "config", None), "hidden_size", None) for submodule in module.modules())
    sizes = sorted({size for size in found if size is not None})
    if len(sizes) > 1:
        raise ConfigError(
            f"{flag('transfer')} with parts of different hidden sizes ({', '.join(map(str, sizes))}): the base has "
            "one. Train such a model without the flag."
        )
    if any(getattr(submodule, "share_embeddings_and_output_weights", False) for submodule in module.modules()):
        refuse(TRANSFER, {"muon_transfer": True, "untie_embeddings_and_output_weights": False})
    for name, param in named:
        if hasattr(param, LORA_FACTOR):
            raise ConfigError(
                f"{flag('transfer')} with a low-rank adapter ({name}): adapters need no base, "
                "--muon-scale-mode unit_rms_norm alone gives their factors rates that fit every rank and width."
            )
        layout = layout_of(param)
        if layout.direction == COLUMN_NORM and layout.kind != TABLE_KIND:
            raise ConfigError(
                f"{flag('transfer')} with {flag('param_rule')} '{name}=col_norm': columns move by the rate itself, "
                "whatever their number, so that the best rate falls with the width. Use row_norm, sign or muon."
            )
        if re.search(r"\.post_\w*(?:norm|layernorm)\.", name) and _LAYER.search(name):
            raise ConfigError(
                f"{flag('transfer')} with a norm at the end of a residual branch ({name}), which would undo the "
                "branch's factor 1 / depth. Train without such norms, or without the flag."
            )


def _check_branches(names: Iterable[str]) -> None:
    """Every residual branch that has weights must have one that is known to end it."""
    ends: dict[str, bool] = {}
    for name in names:
        match = _BRANCH.match(name)
        if match is not None:
            ends[match[1]] = ends.get(match[1], False) or _ENDS.search(name) is not None
    for branch, ended in ends.items():
        if not ended:
            raise ConfigError(
                f"{flag('transfer')}: {branch} has no linear_proj, linear_fc2 or out_proj, so that it is not known "
                "which of its weights end the residual branch. Train such layers without the flag."
            )


def scale_initialization(config: Any, base: str) -> None:
    """Let a model start from weights that fit its size. Call it before the model is built.

    Scripts of ``megatron.training`` need not: ``--muon-transfer`` does it.

    Args:
        config: a Megatron-Core ``TransformerConfig``; its ``init_method`` is replaced: normal, ``init_method_std``
            being that of the base. So is ``output_layer_init_method``, by which branches end: zeros.
        base: as ``--muon-transfer``: ``WIDTHxDEPTH``.

    Raises:
        ConfigError: for a wrong base, or a config that it does not fit: one that scales by itself (``use_mup``), or
            with two projections in a row at the end of a branch (``moe_latent_size``).
    """
    refuse(TRANSFER, {"muon_transfer": base}, config)
    transfer = Transfer.of(base, config)
    _refuse_own_methods(config, base)
    config.init_method = _Normal(config.init_method_std / math.sqrt(transfer.width))
    config.output_layer_init_method = torch.nn.init.zeros_
    setattr(config, BASE_ATTRIBUTE, base)


def _refuse_own_methods(config: Any, base: str) -> None:
    """Initial weights of the user's own making are not replaced in silence."""
    if hasattr(config, BASE_ATTRIBUTE):
        return  # they are this module's
    for name in ("init_method", "output_layer_init_method"):
        method = getattr(config, name, None)
        if method is not None and getattr(method, "func", None) is not torch.nn.init.normal_:
            raise ConfigError(
                f"{flag('transfer')} {base} with {name} {method}: the rule needs normal initial weights whose "
                "deviation it can set. Give the config init_method_std instead."
            )


@dataclass(frozen=True)
class _Normal:
    """Initial weights of mean 0; an object, since configs are copied and pickled."""

    std: float

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.init.normal_(tensor, mean=0.0, std=self.std)
