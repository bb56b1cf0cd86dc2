"""What Muon's updates of low-rank adapters assume of them: DoRA is refused, a multiplier other than 1 is told.

With W + B A in place of W, updates of A at sqrt(r / inputs) and of B at sqrt(outputs / r) (``--muon-scale-mode
unit_rms_norm``, which reads the shapes of the factors) change outputs by the learning rate at every rank r. That holds
if B A is added as it is: not if it is multiplied by alpha / r, and not if the sum is normalised, as DoRA does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from megatron_muon.config import flag
from megatron_muon.errors import ConfigError
from megatron_muon.routing.rules.linear import adapter_name, is_adapter, parts_of

_MAGNITUDES = ("weight_magnitude", "lora_magnitude_vector", "lora_magnitude", "magnitude")
"""Where DoRA keeps the norms of rows: NeMo and Megatron-Bridge; Hugging Face's peft; NeMo Automodel; torchtune."""

_ALPHAS = ("alpha", "lora_alpha")
_RANKS = ("dim", "rank", "r")
_MULTIPLIERS = ("scaling", "scale")


class _Multiplier(NamedTuple):
    """What an adapter's output is multiplied by, and what it is made of where the adapter tells."""

    value: float
    alpha: float | None
    rank: float | None


def check_adapters(module: torch.nn.Module, factors: Mapping[torch.Tensor, str]) -> None:
    """Refuse DoRA, and warn of multipliers other than 1, once for each, of adapters whose factors Muon updates.

    Raises:
        ConfigError: naming the adapters.
    """
    dora: dict[str, str] = {}
    multiplied: dict[_Multiplier, dict[str, None]] = {}
    for adapter, wrapper in _adapters(module):
        for key, weight, _ in parts_of(adapter):
            if weight not in factors:
                continue
            name = adapter_name(factors[weight])
            magnitude = _magnitude(adapter, key) or _magnitude(wrapper, key)
            multiplier = _multiplier(adapter, key)
            if magnitude:
                dora[name] = magnitude
            elif multiplier is not None and multiplier.value != 1.0:
                multiplied.setdefault(multiplier, {})[name] = None
    if dora:
        _refuse(dora)
    for multiplier, names in multiplied.items():
        warnings.warn(_warning(multiplier, list(names)), stacklevel=2)


def _adapters(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module | None]]:
    """Each adapter, and the wrapper that holds it as ``adapter`` if there is one."""
    wrappers = {}
    for wrapper in module.modules():
        adapter = getattr(wrapper, "adapter", None)
        if isinstance(adapter, torch.nn.Module):
            wrappers[adapter] = wrapper
    for adapter in module.modules():
        if is_adapter(adapter):
            yield adapter, wrappers.get(adapter)


def _magnitude(holder: torch.nn.Module | None, key: str) -> str:
    """The name under which ``holder`` keeps a magnitude of its own; empty if it has none.

    peft has a container in every LoRA layer, with an entry for each adapter that is DoRA.
    """
    for name in _MAGNITUDES:
        found = getattr(holder, name, None)
        if isinstance(found, torch.nn.ModuleDict | torch.nn.ParameterDict):
            found = dict(found.items()).get(key)
        if isinstance(found, torch.Tensor | torch.nn.Module):
            return name
    return ""


def _multiplier(adapter: torch.nn.Module, key: str) -> _Multiplier | None:
    """None if the adapter does not tell: neither the multiplier itself, nor alpha and rank."""
    alpha, rank, value = (_number(adapter, names, key) for names in (_ALPHAS, _RANKS, _MULTIPLIERS))
    if value is None and alpha is not None and rank:
        value = alpha / rank
    return None if value is None else _Multiplier(value, alpha, rank)


def _number(adapter: torch.nn.Module, names: tuple[str, ...], key: str) -> float | None:
    for name in names:
        value: Any = getattr(adapter, name, None)
        if isinstance(value, Mapping):
            value = value.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _refuse(dora: Mapping[str, str]) -> None:
    name, magnitude = next(iter(dora.items()))
    raise ConfigError(
        f"{name}{_more(len(dora))}: DoRA (it has a {magnitude}) normalises the sum of weight and adapter and gives it "
        "a magnitude of its own, so that the size of Muon's updates of the factors means nothing. Train it without "
        f"DoRA (as LoRA), or with Adam: {flag('param_rule')} '{name}.*=adam' (a pattern may stand for many)."
    )


def _warning(multiplier: _Multiplier, names: list[str]) -> str:
    told = [
        f"{what} {value:g}"
        for what, value in (("alpha", multiplier.alpha), ("rank", multiplier.rank))
        if value is not None
    ]
    given = f" ({', '.join(told)})" if told else ""
    return (
        f"{names[0]}{_more(len(names))}: this adapter's output is multiplied by {multiplier.value:g}{given}, and so is "
        "what Muon's updates of B do. Learning rates hold for every rank, and for full training, where it is 1: set "
        "alpha to the rank (to its square root in rank-stabilised LoRA), or look for a learning rate of its own."
    )


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""
