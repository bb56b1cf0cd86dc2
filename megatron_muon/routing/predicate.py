"""The one question that decides between Muon and the scalar optimizer."""

from __future__ import annotations

import torch

from megatron_muon.routing.layout import layout_of

REASON_ATTRIBUTE = "skip_orthogonalization_reason"
"""Attribute that says why ``skip_orthogonalization`` was set; a tag set by hand has none."""


def _is_nonlinear_or_embedding(param: torch.Tensor) -> bool:
    """Whether ``param`` belongs to the scalar optimizer (Adam) rather than to Muon.

    Parameter groups, the ownership of DDP buffers and the report all ask this function, so that they cannot disagree.

    Args:
        param: a trainable parameter, possibly one rank's shard.

    Returns:
        True for embeddings and output layers (``is_embedding_or_output_parameter``), for what is not 2-D (or a 3-D
        stack of experts with a layout that says so), for matrices of a single row or column (a vector to Muon: it would
        be normalised, not orthogonalized), and for weights tagged ``skip_orthogonalization = True``.
        ``use_muon = False``, the tag of later Megatron-Core versions, means the same. ``skip_orthogonalization =
        False`` (an override) makes it False for every matrix.
    """
    return exclusion_reason(param) is not None


def exclusion_reason(param: torch.Tensor) -> str | None:
    """Why Muon does not update ``param``, in a few words for the report; None if it does."""
    skip = getattr(param, "skip_orthogonalization", None)
    if skip:
        return getattr(param, REASON_ATTRIBUTE, "tagged skip_orthogonalization")
    if skip is None and getattr(param, "is_embedding_or_output_parameter", False):
        return "embedding or output layer"
    if skip is None and getattr(param, "use_muon", True) is False:
        return "tagged use_muon = False"
    if param.dim() != layout_of(param).dims:
        return f"{param.dim()}-D"
    if skip is None and is_vector(param):
        return "a single row or column"
    return None


def is_vector(param: torch.Tensor) -> bool:
    """Whether the whole weight of which ``param`` may be a shard has a single row or column."""
    return any(size == 1 and not is_divided(param, dim) for dim, size in enumerate(param.shape[-2:]))


def is_divided(param: torch.Tensor, dim: int) -> bool:
    """Whether tensor parallelism divides ``param`` along ``dim``: a size of 1 there says nothing of the whole."""
    return bool(getattr(param, "tensor_model_parallel", False)) and getattr(param, "partition_dim", -1) == dim


def is_expert_parallel(param: torch.Tensor) -> bool:
    """Whether gradients of ``param`` are reduced over the expert data-parallel group."""
    return not getattr(param, "allreduce", True)
