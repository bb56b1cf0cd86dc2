"""Redirects inside ``megatron.core``: random numbers, MoE, and settings that need a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_muon._patching import Original, Patch, Patches, around, replace_by
from megatron_muon.cpu import cuda_api
from megatron_muon.refusals import refuse
from megatron_muon.refusals.cpu import CPU, IN_CONFIG

_RNG = "megatron.core.tensor_parallel.random"
_MOE = "megatron.core.transformer.moe.moe_layer"
_TRACKED = "the tracker forks the generator of the model"
PATCHES = Patches()


@contextlib.contextmanager
def _fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """``CudaRNGStatesTracker.fork`` without its check that the CPU's generator stays as it was."""
    if name not in self.states_:
        raise KeyError(f"random number state {name!r} was not added; states: {sorted(self.states_)}")
    outer = self._current_state_name
    before = torch.get_rng_state()
    if outer in self.states_:  # forks may be nested: the inner one may go on with the state of the outer one
        self.states_[outer] = before
    torch.set_rng_state(self.states_[name])
    self._current_state_name = name
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(self.states_.get(outer, before))
        self._current_state_name = outer


@PATCHES.around(
    "torch.utils.data.dataloader:_BaseDataLoaderIter.__init__",
    "a new iterator draws a seed from the CPU's generator, which the model uses here, and only the first rank of "
    "each tensor-parallel group loads data: the others would draw other dropout masks. No pinned memory either",
)
def _wrap_data_loader_iterator(original: Original, self: Any, loader: Any) -> None:
    loader.pin_memory = False
    state = torch.get_rng_state()
    original(self, loader)
    torch.set_rng_state(state)


@PATCHES.around(
    "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
    "leaves tensors that are on the CPU already as they are, but all_to_all takes numbers for its splits",
)
def _move_to_host(original: Original, tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@PATCHES.around(
    "megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",
    "settings that need a GPU must fail when the configuration is made, not in the first step",
)
def _wrap_config_check(original: Original, self: Any) -> None:
    refuse((*CPU, *IN_CONFIG), self)
    original(self)


@PATCHES.around(
    f"{_RNG}:CheckpointWithoutOutput.__init__",
    "takes its default, False, for FP8, which needs TransformerEngine: --recompute-modules layernorm",
)
def _without_fp8(original: Original, self: Any, fp8: Any = None) -> None:
    original(self)
    self.fp8 = False


class DuplicatedLinear(torch.nn.Linear):
    """A linear layer that every tensor-parallel rank has whole, as TransformerEngine's with ``"duplicated"``.

    Args:
        input_size: of the last dimension that goes in.
        output_size: of the last dimension that comes out.
        config: Megatron-Core's ``TransformerConfig``.
        init_method: fills the weight in place.
        bias: whether there is one, of zeros.
    """

    def __init__(
        self, input_size: int, output_size: int, config: Any, init_method: Callable[[torch.Tensor], Any], bias: bool
    ) -> None:
        super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)
        if config.perform_initialization:
            init_method(self.weight)
        if bias:
            torch.nn.init.zeros_(self.bias)
        parameter: Any
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # each rank sees its part of the sequence

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """The product, and no bias that is left to add."""
        return super().forward(input), None


def _local_projection(original: Any) -> Callable[..., Any]:
    def projection(
        input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool, **options: Any
    ) -> Any:
        if original is not None and config.transformer_impl != "local":
            return original(input_size, output_size, config=config, init_method=init_method, bias=bias, **options)
        return DuplicatedLinear(input_size, output_size, config, init_method, bias)

    return projection


def _not_alone(original: Original, input_: torch.Tensor, group: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
    alone = group is not None and group.size() == 1
    return input_ if alone else original(input_, group, *args, **kwargs)


PATCHES += [
    Patch(f"{_RNG}:_get_cuda_rng_state", replace_by(cuda_api.get_rng_state), _TRACKED),
    Patch(f"{_RNG}:_set_cuda_rng_state", replace_by(cuda_api.set_rng_state), _TRACKED),
    Patch(
        f"{_RNG}:CudaRNGStatesTracker.fork",
        replace_by(_fork),
        "warns whenever the CPU's generator is used inside, and here that is the point",
    ),
    Patch(
        "megatron.core.transformer.moe.moe_utils:te_general_gemm",
        replace_by(None),
        "the router's matrix product in a wider dtype uses TransformerEngine's kernel wherever it can be imported",
        create=True,
    ),
    *(
        Patch(
            f"megatron.core.tensor_parallel.mappings:{name}",
            around(_not_alone),
            "experts add their bias in place to the sum over a single rank: a view, where autograd forbids it",
        )
        for name in ("reduce_from_tensor_model_parallel_region", "reduce_scatter_to_sequence_parallel_region")
    ),
    Patch(f"{_MOE}:HAVE_TE", replace_by(True), "experts with a latent size insist on TransformerEngine", copies_in=()),
    Patch(f"{_MOE}:TELinear", _local_projection, "their projections are TransformerEngine's", copies_in=()),
]
