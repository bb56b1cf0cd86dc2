"""Where options come from, and how long each source counts.

A model's options travel in its ``OptimizerConfig`` (:mod:`megatron_muon.plugin.config_fields`), and :func:`of` reads
them there: a second model in the process, with other options or with Adam, has a config of its own.

Some is asked for before a config is at hand: DDP lays out its buffers, GatedDeltaNet tags its weights, initial weights
are scaled, TransformerEngine is told what to measure. :func:`current` is for them alone, and what new configs start
from: what was said last on the command line or by ``install(config)``. The optimizer factory refuses a model whose
buffers were laid out by other options than its config has.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_muon.config import PREFIX, MuonConfig
from megatron_muon.knobs import EVERY_OPTIMIZER

ANY_OPTIMIZER = tuple(
    field.name for field in dataclasses.fields(MuonConfig) if field.metadata["readers"] == EVERY_OPTIMIZER
)
"""Options that act on models of every optimizer, Megatron's own too."""


@dataclass
class _Said:
    """What was said so far.

    Attributes:
        installed: options given to ``install()``.
        parsed: those of the command line, if it was checked after them.
        on_flags: whether a parser was made after them: then they are the defaults of its flags.
    """

    installed: MuonConfig | None = None
    parsed: MuonConfig | None = None
    on_flags: bool = False


_said = _Said()


def current() -> MuonConfig:
    """The options in force where no config is at hand; new configs start from them."""
    return _said.parsed or _said.installed or MuonConfig()


def installed() -> MuonConfig:
    """Options given to ``install()``, or the defaults."""
    return _said.installed or MuonConfig()


def _origin() -> str:
    """Where :func:`current` has them from, in words."""
    if _said.parsed is not None:
        return "those of the command line"
    return "the defaults" if _said.installed is None else "those given to install()"


def without_refusal() -> MuonConfig:
    """The options in force, but weights that no rule knows are Muon's and stop nothing.

    When DDP is built nobody knows yet which optimizer will come: Megatron's other matrix optimizers take such weights,
    and for Muon the optimizer factory refuses them, on all ranks at once.
    """
    options = current()
    return dataclasses.replace(options, unknown_2d="muon") if options.unknown_2d == "error" else options


def of(config: Any) -> MuonConfig:
    """The options of a model, checked.

    Args:
        config: its ``OptimizerConfig``. With another optimizer than this package's only :data:`ANY_OPTIMIZER` count.

    Raises:
        ConfigError: for a wrong value.
    """
    from megatron_muon.plugin.optimizer_config import is_ours

    if is_ours(config.optimizer):
        return MuonConfig.from_optimizer_config(config)
    known = current()  # no run of Adam fails because its config is of a class of its own
    values = {name: getattr(config, PREFIX + name, getattr(known, name)) for name in ANY_OPTIMIZER}
    return MuonConfig(**values).validate()


def supply(values: dict[str, Any], megatron: Mapping[str, Collection[Any]], what: str) -> None:
    """Put the options in force into what was made without this package, and say so if it is for one of its optimizers.

    What was chosen stays. A value that Megatron-Core gives of itself was chosen by nobody, as far as can be told: a
    ``blockwise`` that no one asked for would be another optimizer.

    Args:
        values: by name, ``optimizer`` too.
        megatron: the defaults of Megatron-Core, by name.
        what: where the values come from, in words.
    """
    from megatron_muon.plugin.optimizer_config import is_ours

    known, changed = current(), []
    for field in dataclasses.fields(MuonConfig):
        name, default = PREFIX + field.name, getattr(known, field.name)
        if name not in values:
            values[name] = default
        elif values[name] != default and values[name] in megatron.get(name, ()):
            changed.append(f"{name} {default} instead of {values[name]}")
            values[name] = default
    if is_ours(values.get("optimizer")):
        instead = (
            f" ({', '.join(changed)}: Megatron-Core's default, which is not taken for a choice; whoever wants it says "
            "so by install(MuonConfig(...)))"
            if changed
            else ""
        )
        say(f"{what}; options that it lacks are {_origin()}{instead}.")


def take_installed(options: MuonConfig) -> None:
    """Options given to ``install()``; they count from now on."""
    if _said.parsed not in (None, options):
        say(
            "install() is given other options than the command line has, which was read before: a model whose "
            "OptimizerConfig is made of its arguments keeps those of the command line."
        )
    _said.installed, _said.parsed, _said.on_flags = options, None, False


def take_arguments(options: MuonConfig) -> None:
    """Options of a command line; they count from now on."""
    _said.parsed = options


def flag_defaults() -> MuonConfig:
    """The defaults of flags, for a parser that is made now."""
    _said.on_flags = True
    return installed()


def given_late() -> MuonConfig | None:
    """Options given to ``install()`` that no parser has had as its defaults; None if there are none."""
    return None if _said.on_flags else _said.installed


def forget() -> None:
    """Nothing was said."""
    _said.installed, _said.parsed, _said.on_flags = None, None, False


def training_arguments() -> Any:
    """The arguments of ``megatron.training``; None in code that has none."""
    module = sys.modules.get("megatron.training.global_vars")
    return None if module is None else module._GLOBAL_ARGS


def say(text: str) -> None:
    """Print a line on the first rank."""
    distributed = sys.modules.get("torch.distributed")
    started = distributed is not None and distributed.is_available() and distributed.is_initialized()
    rank = distributed.get_rank() if started else int(os.environ.get("RANK", "0"))  # type: ignore[union-attr]
    if rank == 0:
        print(f"megatron_muon: {text}", flush=True)
