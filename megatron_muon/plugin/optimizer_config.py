"""An early check of ``OptimizerConfig``.

Code that builds the config itself (NeMo, Megatron-Bridge, own loops) gets the same refusals as the command line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_muon._patching import Patch
from megatron_muon.config import MuonConfig, flag
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.adaptive import check_second_moment
from megatron_muon.plugin.variants import check_variant

__all__ = [
    "OPTIMIZERS",
    "REFUSED",
    "check_adaptive",
    "check_optimizer_config",
    "is_layer_wise",
    "is_ours",
    "patches",
    "refuse",
]

_CONFIG = "megatron.core.optimizer.optimizer_config:OptimizerConfig"

OPTIMIZERS = ("muon", "adaptive_muon", "spectral_sphere", "stiefel_muon")
"""Names that this package registers; ``dist_<name>`` is Megatron's older spelling for the layer-wise form."""


def is_ours(optimizer: str | None) -> bool:
    """Whether ``--optimizer`` names one of this package's optimizers."""
    return (optimizer or "").removeprefix("dist_") in OPTIMIZERS


def is_layer_wise(config: Any) -> bool:
    """Whether an ``OptimizerConfig`` asks for the layer-wise form, by its field or the older name ``dist_...``."""
    return config.use_layer_wise_distributed_optimizer or config.optimizer.startswith("dist_")


REFUSED = {
    "use_precision_aware_optimizer": "it exists for Adam only; leave it off",
    "optimizer_cpu_offload": "Muon's state cannot be offloaded; leave it off",
    "optimizer_cuda_graph": "the step of Muon is not captured; leave it off",
}
"""Options of Megatron's optimizers that Muon does not have, with the way out."""


def refuse(settings: Any, refused: dict[str, str]) -> None:
    """Refuse options that are on.

    Args:
        settings: an ``OptimizerConfig`` or parsed arguments.
        refused: what to say about each attribute that must be off.

    Raises:
        ConfigError: naming the flag and the way out.
    """
    for name, way_out in refused.items():
        if getattr(settings, name, False):
            raise ConfigError(f"--{name.replace('_', '-')} with --optimizer {settings.optimizer}: {way_out}.")


def check_optimizer_config(config: Any, *, pairs: bool = True) -> MuonConfig:
    """Check an ``OptimizerConfig`` for one of our optimizers, knobs and combinations.

    Args:
        config: the ``OptimizerConfig``.
        pairs: see :meth:`megatron_muon.MuonConfig.validate`.

    Raises:
        ConfigError: naming the field, its value and the way out.
    """
    if config.fp16:
        raise ConfigError("--fp16 (OptimizerConfig.fp16 True): Muon needs no loss scale; use --bf16 or float32.")
    if config.use_distributed_optimizer:
        raise ConfigError(
            "OptimizerConfig.use_distributed_optimizer True: Megatron's distributed optimizer cuts weights into flat "
            "slices, which cannot be orthogonalized. Set use_layer_wise_distributed_optimizer=True and "
            "use_distributed_optimizer=False (the command line does so by itself)."
        )
    refuse(config, REFUSED)
    if is_layer_wise(config) and config.overlap_param_gather_with_optimizer_step:
        raise ConfigError(
            "--overlap-param-gather-with-optimizer-step with layer-wise Muon: not supported by Megatron-Core; leave it "
            "off (--overlap-param-gather works)."
        )
    muon = MuonConfig.from_optimizer_config(config, pairs=pairs)
    check_adaptive(config, muon)
    check_transfer(config.optimizer, muon)
    if pairs:
        check_variant(config, muon)
    return muon


def check_adaptive(settings: Any, muon: MuonConfig) -> None:
    """Check the flags of ``adaptive_muon``. NAMO does not go with all scale modes, nor with ``--muon-transfer``.

    Args:
        settings: an ``OptimizerConfig`` or parsed arguments.
        muon: the options in it.

    Raises:
        ConfigError: naming the flags and the way out.
    """
    if settings.optimizer.removeprefix("dist_") != "adaptive_muon":
        return
    method = settings.adaptive_muon_moment2_method
    if muon.transfer and method == "namo":
        raise ConfigError(
            f"{flag('transfer')} {muon.transfer} with --adaptive-muon-moment2-method namo: there is no rule for it, "
            "since the size of its updates depends on that of gradients. Use --adaptive-muon-moment2-method normuon or "
            "adamuon, with --muon-scale-mode spectral_norm."
        )
    check_second_moment(method, settings.adaptive_muon_beta2, settings.adaptive_muon_eps, muon.scale_mode)


def check_transfer(optimizer: str, muon: MuonConfig) -> None:
    """``--muon-transfer`` goes with some optimizers only.

    Raises:
        ConfigError: naming the flag and the way out.
    """
    name = optimizer.removeprefix("dist_")
    if muon.transfer and name not in ("muon", "adaptive_muon"):
        raise ConfigError(
            f"{flag('transfer')} {muon.transfer} with --optimizer {name}: there is no rule for it; use muon or "
            "adaptive_muon."
        )
    if muon.transfer and name == "adaptive_muon" and muon.scale_mode != "spectral_norm":
        raise ConfigError(
            f"{flag('transfer')} {muon.transfer} with --optimizer adaptive_muon and --muon-scale-mode "
            f"{muon.scale_mode}: second moments change the spectral norm of updates. Add --muon-scale-mode "
            "spectral_norm."
        )


def patches() -> list[Patch]:
    """The hook on ``OptimizerConfig``'s own check."""
    return [
        Patch(
            f"{_CONFIG}.__post_init__",
            _with_check,
            "a wrong Muon option in an OptimizerConfig is refused when it is built, before the model is",
        ),
    ]


def _with_check(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        if is_ours(self.optimizer):
            check_optimizer_config(self, pairs=False)  # some may be set as attributes later
        original(self)

    return __post_init__
