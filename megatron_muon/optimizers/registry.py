"""The variants of Muon by name: this package's, and those that users register."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from megatron_muon import choices
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.adaptive import NAMO, AdaMuon, AdaMuonEO, NorMuon, SecondMoment
from megatron_muon.optimizers.sizes import Hyperball, PolarGrad
from megatron_muon.optimizers.sphere import SpectralSphere
from megatron_muon.optimizers.stages import Variant
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.refusals import Settings

VARIANTS: dict[str, type[Variant]] = {
    "none": Variant,
    **{cls.name: cls for cls in (Variant, PolarGrad, Hyperball, AdaMuon, AdaMuonEO, NorMuon, NAMO, SpectralSphere)},
    "stiefel": StiefelMuon,
}
"""The class of each variant, by the name that ``Muon(params, variant=...)`` takes."""

_OWN = frozenset(VARIANTS.values())
_MOMENTS = frozenset(cls.state_name for cls in _OWN if issubclass(cls, SecondMoment))


def register_variant[V: type[Variant]](cls: V) -> V:
    """Make a variant known by its name, to ``Muon(params, variant=...)`` and to ``--muon-variant``; a class decorator.

    Call it before the command line is parsed. A class that is defined again, in a notebook, takes the place of the one
    before.

    Args:
        cls: with a ``name`` of its own, which checkpoints have, too; made without arguments where its name is given.

    Raises:
        ConfigError: if another class has the name, or it has none.
        TypeError: for what is no such class.
    """
    if not (isinstance(cls, type) and issubclass(cls, Variant)):
        raise TypeError(f"register_variant({cls!r}): give it a subclass of Variant; its name is its attribute name.")
    if not isinstance(cls.name, str) or not cls.name:
        raise ConfigError(f"{cls.__name__}.name {cls.name!r}: give the class a name, a string.")
    known = VARIANTS.get(cls.name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"{cls.__name__}: {known.__name__} has the name {cls.name!r}. Give it another.")
    VARIANTS[cls.name] = cls
    if cls.name not in choices.VARIANTS:
        choices.VARIANTS.append(cls.name)
    return cls


def foreign_moments(variant: Variant, state: Mapping[str, Any]) -> list[str]:
    """Second moments in a weight's state that are other variants' of this package; a user's variant may read any."""
    if type(variant) not in _OWN:
        return []
    return sorted(name for name in _MOMENTS - {getattr(variant, "state_name", "")} if name in state)


def variant_of(variant: str | Variant) -> Variant:
    """The variant that ``Muon(params, variant=...)`` names or is given.

    Raises:
        ConfigError: for an unknown name.
    """
    if isinstance(variant, Variant):
        return variant
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ConfigError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}, or give an object.")
    return VARIANTS[variant]()


def made_anew(variant: Variant) -> Variant:
    """A variant of the same options, for another optimizer: each keeps what it has found of its own weights.

    Raises:
        ConfigError: if its class does not keep its options as attributes of their names.
    """
    names = inspect.signature(type(variant)).parameters
    if missing := [name for name in names if not hasattr(variant, name)]:
        raise ConfigError(
            f"a {type(variant).__name__} that another optimizer has, too, and that does not keep its {missing[0]} as "
            "an attribute: make one for each optimizer."
        )
    return type(variant)(**{name: getattr(variant, name) for name in names})


def variant_asked_for(*sources: object) -> Variant:
    """The variant that flags ask for: the one place that knows what Megatron's optimizers and flags mean.

    Args:
        sources: see :class:`megatron_muon.refusals.Settings`; what they lack of a variant's options has its default.
    """
    settings = Settings(*sources)
    name = {
        "muon": settings.get("muon_variant"),
        "adaptive_muon": settings.get("adaptive_muon_moment2_method"),
        "spectral_sphere": "spectral_sphere",
        "stiefel_muon": "stiefel",
    }[settings.optimizer]
    cls = VARIANTS[name]
    given = {option: settings.get(name) for option, name in cls.flags.items()}
    return cls(**{option: value for option, value in given.items() if value is not None})
