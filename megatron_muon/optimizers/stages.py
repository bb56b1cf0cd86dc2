"""The stages of a step at which variants of Muon differ, and what each is given.

A step of :class:`megatron_muon.optimizers.muon.Muon` does, for the matrices of all weights:

1. the momentum takes in the gradient; with Nesterov momentum both are mixed. The result is u;
2. :meth:`Variant.transform` changes u before it is orthogonalized, element by element;
3. the engine orthogonalizes whole logical matrices by Newton-Schulz: the direction O;
4. :meth:`Variant.adapt` changes O, by second moments or norms;
5. O gets its size: by the scale mode's factor, or by its measured norm;
6. weights decay, and O is added to them;
7. :meth:`Variant.retract` brings weights back to where they must lie.

A variant is a subclass of :class:`Variant`. It sees batches of matrices, with their rows and columns on this rank, and
gets sums and norms of whole matrices from :class:`megatron_muon.optimizers.matrices.Matrices`, which adds up what
tensor-parallel ranks hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from megatron_muon.choices import VARIANTS
from megatron_muon.config import MuonConfig
from megatron_muon.engine.callbacks import Reduce
from megatron_muon.engine.slices import Slices
from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers.matrices import Matrices, Update
from megatron_muon.optimizers.param_step import ParamStep
from megatron_muon.optimizers.precision import own_dtype
from megatron_muon.orthogonalize.kernels.elementwise import Rate
from megatron_muon.routing.layout import BALLS, MSIGN, layout_of


def init_rows(param: torch.Tensor, state: dict[str, Any], *names: str) -> None:
    """Create missing state that has one number for each row of a weight, of 32 bits at least; 0: not known yet.

    Numbers of a whole matrix are repeated in each of its rows, so that they are saved and resharded with them.
    """
    for name in names:
        if name not in state:
            state[name] = param.new_zeros(layout_of(param).row_shape(param.shape), dtype=own_dtype(param.dtype))


class Work(Protocol):
    """The update of all matrices of one direction, see :class:`megatron_muon.optimizers.step.EngineStep`."""

    engine: StepEngine
    direction: str
    weights: Mapping[int, ParamStep]

    def run(self) -> None:
        """Update all matrices as plain Muon does, with the variant's other hooks."""

    def read(self, slices: Sequence[Slices], batches: Sequence[torch.Tensor]) -> None:
        """Pack u, after :meth:`Variant.transform`: a :data:`megatron_muon.engine.callbacks.Read`."""

    def matrices(self, slices: Sequence[Slices], directions: Sequence[torch.Tensor], reduce: Reduce) -> Matrices:
        """What variants see of a chunk, in a :data:`megatron_muon.engine.callbacks.Write`."""

    def iterations(self, matrices: Matrices, tensors: Sequence[torch.Tensor], state: str, usual: int) -> int:
        """The number of power iterations, see :meth:`megatron_muon.optimizers.power.WarmStarts.iterations`."""

    @property
    def is_measured(self) -> bool:
        """Whether :meth:`measure` does anything."""

    def measure(
        self,
        matrices: Matrices,
        results: Sequence[torch.Tensor],
        changes: Sequence[torch.Tensor] | None,
        factor: Callable[[Update], Rate | torch.Tensor],
        *,
        are_successive: bool = True,
    ) -> None:
        """What a variant that writes weights itself calls before, see :class:`megatron_muon.optimizers.probe.Probe`.

        Args:
            matrices: the updates.
            results: of each what was orthogonalized, not to be changed here.
            changes: what is to be added to the weights; None: the results.
            factor: on the changes of an update, learning rate and all; a number, or (matrices,).
            are_successive: whether results are updates, which may be compared with those of the step before.
        """


class Variant:
    """Plain Muon, and the base of all that differs from it: a variant overrides what it does otherwise.

    Its options are arguments of its constructor, kept as attributes of the same names. An object serves one optimizer.
    """

    name = "muon"
    """The name in the registry, and in checkpoints, where it tells the state of variants apart."""

    optimizer = "muon"
    """The value of Megatron's ``--optimizer`` that builds it."""

    flags: ClassVar[Mapping[str, str]] = {}
    """Its options, each with the setting that gives it (``muon_sphere_radius``)."""

    decays = True
    """Whether weight decay makes sense: on a sphere it would be undone."""

    scales = True
    """Whether the scale mode acts on its updates."""

    lends = True
    """Whether other data-parallel ranks may orthogonalize for it: once for each matrix, knowing nothing else."""

    directions: tuple[str, ...] = (MSIGN, *BALLS)
    """The kinds of updates that it has, see :class:`megatron_muon.routing.layout.MatrixLayout`."""

    watched: tuple[str, ...] = ()
    """State that was found from the weights: it is found anew once somebody else has written to it or to them."""

    @property
    def adapts(self) -> bool:
        """Whether :meth:`adapt` does anything: plain Muon adds directions without a copy."""
        return type(self).adapt is not Variant.adapt

    @property
    def retracts(self) -> bool:
        """Whether :meth:`retract` does anything."""
        return type(self).retract is not Variant.retract

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a command line that asks for it: options that do not go together are refused by them."""
        own = {setting: getattr(self, option) for option, setting in self.flags.items()}
        return {"optimizer": self.optimizer, "muon_variant": self.name if self.name in VARIANTS else "none", **own}

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """Options that checkpoints record, so that changes can be detected."""
        return {}

    @property
    def obstacle(self) -> str:
        """Why there is no CUDA graph of its step; empty if nothing is known."""
        return ""

    def is_settled(self) -> bool:
        """Whether the next step does what the last one did, as far as the variant decides it on the host."""
        return True

    def check(self, config: MuonConfig) -> None:
        """Refuse options of the optimizer, or of one of its param groups, that do not go with it.

        Raises:
            ConfigError: naming option, value and way out.
        """

    def notes(self, params: Sequence[torch.Tensor]) -> list[str]:
        """Lines that the report of a run adds about this rank's weights."""
        return []

    def forget(self) -> None:
        """Discard what is kept beside the state, because weights or state have been replaced."""

    def begin_step(self) -> None:
        """Called before a step changes anything."""

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """Create what the variant keeps of a weight, where it is missing.

        Tensors of the weight's shape, or with 1 in place of rows or columns, are saved and resharded like the weight.
        """

    def missing(self, state: Mapping[str, Any]) -> str:
        """What the loaded state of a weight lacks, as the end of a line that tells it; empty if nothing."""
        return ""

    def update(self, work: Work) -> None:
        """Carry out the update of all matrices of one direction: by :meth:`Work.run`, which calls what is below.

        A variant that needs several passes over its matrices, or another computation, does it here with the engine,
        and leaves other directions (``work.direction``) to :meth:`Work.run`.
        """
        work.run()

    def transform(self, batches: Sequence[torch.Tensor]) -> None:
        """Change, in place, the momentum that is packed to be orthogonalized."""

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Change directions before they get their scale and are added to the weights.

        Args:
            matrices: the updates; ``direction`` may be changed in place.

        Returns:
            one tensor of its direction's shape for each update.
        """
        return [update.direction for update in matrices.updates]

    def retract(self, matrices: Matrices) -> None:
        """After the addition, change the weights: by ``multiply``, ``add`` or ``keep`` of each update."""
