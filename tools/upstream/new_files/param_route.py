"""Which optimizer updates a parameter: one attribute, read by one predicate.

``param.optimizer_route`` is ``'matrix'`` (the emerging optimizer, e.g. Muon) or ``'scalar'`` (the
one beside it, e.g. Adam). Without it the route follows from the shape. Param groups, DDP's buffers
and the muP rules all ask :func:`is_matrix_param`, so that they cannot disagree.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

ROUTE_ATTR = "optimizer_route"
METADATA_ATTR = "optimizer_metadata"
"""What the optimizer is told of a parameter, e.g. how a fused weight is split."""

MATRIX, SCALAR = "matrix", "scalar"

_routers: list[Callable[[torch.nn.Module], None]] = []


def is_matrix_param(param: torch.Tensor) -> bool:
    """Whether the emerging optimizer updates ``param``.

    Raises:
        ValueError: if its route is neither of the two.
    """
    route = getattr(param, ROUTE_ATTR, None)
    if route not in (None, MATRIX, SCALAR):
        raise ValueError(f"{ROUTE_ATTR} must be '{MATRIX}' or '{SCALAR}', not {route!r}")
    if route is not None:
        return route == MATRIX
    return not getattr(param, "is_embedding_or_output_parameter", False) and param.dim() == 2


def add_param_router(router: Callable[[torch.nn.Module], None]) -> Callable[[], None]:
    """Have ``router`` set routes of model chunks, before buffers and param groups are made.

    Returns:
        what takes it away again.
    """
    _routers.append(router)
    return lambda: _routers.remove(router)


def route_params(model_chunks: Iterable[Any]) -> None:
    """Ask the routers about each chunk, in the order in which they were added."""
    for model_chunk in model_chunks:
        for router in _routers:
            router(model_chunk)
