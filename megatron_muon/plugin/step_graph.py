"""``--optimizer-cuda-graph``: Muon's part of the step is launched as a CUDA graph.

Megatron-Core captures the whole of ``optimizer.step()``, which with Muon reads on the host: whether gradients are
finite, before anything is written; the gradient's norm, without TransformerEngine. Here each Muon captures its own part
(:mod:`megatron_muon.optimizers.graph`), which has nearly all of the step's kernels. What is around it stays as it is:
gradients, their norm, Adam's part, the gathers of parameters.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_muon._patching import Original, Patches
from megatron_muon.agree import Ranks
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.graph import WARMUP_STEPS, Captures, StepGraph, check_device, cuda_graph
from megatron_muon.optimizers.muon import Muon
from megatron_muon.plugin import options
from megatron_muon.plugin.optimizer_state import leaves, param_states
from megatron_muon.routing import global_names
from megatron_muon.routing.wrappers import unwrapped

PATCHES = Patches()


@PATCHES.around(
    "megatron.core.optimizer.optimizer_cuda_graph:OptimizerCudaGraphWrapper.__call__",
    "it captures what the host decides in a step with Muon, whose own part is captured instead",
)
def _uncaptured(original: Original, self: Any, *args: Any, **kwargs: Any) -> Any:
    if _muons(getattr(self.optimizer_step_func, "__self__", None)):
        return self.optimizer_step_func(*args, **kwargs)
    return original(self, *args, **kwargs)


def _muons(optimizer: Any) -> list[Muon]:
    """The Muons in an optimizer of Megatron-Core, also in one of several models."""
    infos = getattr(optimizer, "module_infos", None)
    parts = [optimizer] if infos is None else [info.optimizer for info in infos.values()]
    inner = [leaf.optimizer for part in parts if part is not None for leaf, _ in leaves(part)]
    return [each for each in inner if isinstance(each, Muon)]


@contextlib.contextmanager
def adam_uncaptured(config: Any) -> Iterator[None]:
    """Within, Adam is built for steps that nobody captures: otherwise its count of steps would be on the device."""
    asked = config.optimizer_cuda_graph
    config.optimizer_cuda_graph = False
    try:
        yield
    finally:
        config.optimizer_cuda_graph = asked


def capture_steps(optimizer: Any, model_chunks: Sequence[Any], ranks: Ranks) -> None:
    """Capture the steps of all Muons of a model, after ``--cuda-graph-warmup-steps``, on all ranks at once.

    Args:
        optimizer: Megatron-Core's, of the model.
        model_chunks: of the model on this rank.
        ranks: the model's.

    Raises:
        ConfigError: if a step cannot be captured, saying what prevents it.
    """
    for leaf, _ in leaves(optimizer):
        if isinstance(leaf.optimizer, Muon):
            check_device(leaf.optimizer)
            _check_gradients(leaf, model_chunks)
    pool = functools.partial(_on_shared_stream, any(_shares_pool(chunk) for chunk in model_chunks))
    graphs = []
    for muon in _muons(optimizer):
        muon.graph = StepGraph(muon, pool)
        graphs.append(muon.graph)
    warmup = getattr(options.training_arguments(), "cuda_graph_warmup_steps", WARMUP_STEPS)
    captures, step = Captures(graphs, ranks, warmup), optimizer.step_with_ready_grads

    def step_with_ready_grads() -> Any:
        captures.before_step()
        return step()

    optimizer.step_with_ready_grads = step_with_ready_grads


def _check_gradients(leaf: Any, model_chunks: Sequence[Any]) -> None:
    """Refuse gradients that come to other memory in each step: a graph works on what it was captured with.

    Raises:
        ConfigError: naming the weight and the way out.
    """
    names = {param: name for chunk in model_chunks for name, param in global_names(chunk)}
    for each in param_states(leaf, refuse=False):
        if each.key is not None and getattr(each.param, "main_grad", None) is None:
            raise ConfigError(
                f"--optimizer-cuda-graph: the gradient of {names[each.param]} is in no buffer of "
                "DistributedDataParallel, and would come to other memory in each step. Wrap the model with it, or "
                "leave --optimizer-cuda-graph off."
            )


def _shares_pool(chunk: Any) -> bool:
    return bool(getattr(unwrapped(chunk).config, "cuda_graph_use_single_mempool", False))


def _on_shared_stream(shares_pool: bool, work: Callable[[], None]) -> Callable[[], None]:
    """Capture work on the stream, and with the memory, of Megatron-Core's own graphs."""
    from megatron.core.full_cuda_graph import get_graph_pool, get_shared_capture_stream

    return cuda_graph(work, get_graph_pool(shares_pool), get_shared_capture_stream())
