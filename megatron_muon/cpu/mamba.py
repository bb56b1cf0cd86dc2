"""What Mamba-2's mixer takes from mamba-ssm and causal-conv1d, in plain torch.

Megatron-Core's ``MambaMixer`` refuses to be built without these packages, whose kernels are CUDA and Triton. The
functions here have their names, arguments and arithmetic. A head of state ``h`` follows, at token ``t``,

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,    y_t = h_t C_t + D x_t

(state-space duality, arXiv 2405.21060). :func:`mamba_chunk_scan_combined` computes it in chunks, as matrix products
inside a chunk and one step of the recurrence from chunk to chunk.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn import functional

from megatron_muon._patching import Patch, replace_by
from megatron_muon.cpu import gated_delta_net

_NO_PACKING = (
    "packed sequences (packed_seq_params, seq_idx) in Mamba layers need the kernels of mamba-ssm and causal-conv1d and "
    "a GPU; on the CPU train without sequence packing"
)


class GatedRMSNorm(torch.nn.Module):
    """RMSNorm over groups of channels, with an optional gate ``silu(z)``.

    Args:
        hidden_size: number of channels.
        eps: added to the mean square.
        group_size: channels that are normalized together; all by default.
        norm_before_gate: ``norm(x) * silu(z)`` if true, otherwise ``norm(x * silu(z))``.
        device: of the weight.
        dtype: of the weight.

    Raises:
        ValueError: ``hidden_size`` is no multiple of ``group_size``.
    """

    tp_group: Any = None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.norm_before_gate = norm_before_gate
        if hidden_size % self.group_size:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of group_size {group_size}")
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize ``x`` of ``[..., hidden_size]``, gated by ``z`` of the same shape; in fp32, returned as ``x``."""
        out, gate = _wide(x), 1 if z is None else functional.silu(_wide(z))
        if not self.norm_before_gate:
            out = out * gate
        groups = out.unflatten(-1, (-1, self.group_size))
        out = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * _wide(self.weight)
        if self.norm_before_gate:
            out = out * gate
        return out.to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight, whose channels are split over tensor-parallel ranks as the mixer's heads are."""
        utils = importlib.import_module("megatron.core.transformer.utils")
        return utils.make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=utils.ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Depth-wise causal convolution, followed by SiLU where ``activation`` says so.

    Args:
        x: ``[batch, channels, seq]``.
        weight: ``[channels, width]``.
        bias: ``[channels]``.
        seq_idx: not supported.
        activation: None, ``"silu"`` or ``"swish"``.

    Returns:
        ``[batch, channels, seq]``.

    Raises:
        NotImplementedError: ``seq_idx`` is given.
    """
    _refuse_packing(seq_idx)
    return gated_delta_net.causal_conv1d(x.transpose(1, 2), weight, bias, activation)[0].transpose(1, 2)


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective state-space scan of Mamba-2, computed in fp32.

    Args:
        x: inputs, ``[batch, seq, heads, head_dim]``.
        dt: step sizes, ``[batch, seq, heads]``, before bias, softplus and limits.
        A: decay rates, ``[heads]``, negative.
        B: input projections, ``[batch, seq, groups, state]``; ``heads`` is a multiple of ``groups``, each group serves
            adjacent heads.
        C: output projections, as ``B``.
        chunk_size: tokens in a chunk; changes rounding and speed only.
        D: skip connection, ``[heads]`` or ``[heads, head_dim]``.
        z: gate as ``x``; the result is multiplied by ``silu(z)``.
        dt_bias: ``[heads]``, added to ``dt``.
        initial_states: ``[batch, heads, head_dim, state]``; zeros by default.
        seq_idx: not supported.
        dt_softplus: whether the step size is ``softplus(dt + dt_bias)``.
        dt_limit: least and greatest step size.
        return_final_states: whether to return the states after the last token too.
        state_dtype: in which the states between chunks are kept; the dtype of ``C`` by default.

    Returns:
        ``[batch, seq, heads, head_dim]`` in the dtype of ``x``, and if asked for the final states in fp32, shaped as
        ``initial_states``.

    Raises:
        NotImplementedError: ``seq_idx`` is given.
    """
    _refuse_packing(seq_idx)
    length, heads = x.size(1), x.size(2)
    step = _wide(dt) if dt_bias is None else _wide(dt) + _wide(dt_bias)
    step = (functional.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    wide_x = _wide(x)
    # A step of zero leaves the state as it is, so the last chunk can be filled up with zeros.
    steps, inputs, to_state, from_state = (
        _chunks(tensor, chunk_size) for tensor in (step, wide_x, _for_heads(B, heads), _for_heads(C, heads))
    )
    inputs = inputs * steps.unsqueeze(-1)
    log_decay = (steps * A).cumsum(2)  # of each token since the start of its chunk, [batch, chunk, token, head]
    left = (log_decay[:, :, -1:] - log_decay).exp()  # of an input until the end of its chunk
    added = torch.einsum("bckh,bckhp,bckhn->bchpn", left, inputs, to_state)
    before, final = _pass_states(added, log_decay[:, :, -1].exp(), initial_states)
    before = _wide(before.to(state_dtype or C.dtype))
    out = torch.einsum("bcqh,bcqhn,bchpn->bcqhp", log_decay.exp(), from_state, before)
    out = out + torch.einsum("bchqk,bckhp->bcqhp", _within_chunk(log_decay, to_state, from_state), inputs)
    out = out.flatten(1, 2)[:, :length]
    if D is not None:
        out = out + wide_x * (D if D.dim() == 2 else D.unsqueeze(-1))
    if z is not None:
        out = out * functional.silu(_wide(z))
    out = out.to(x.dtype)
    return (out, final) if return_final_states else out


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    seq_idx: torch.Tensor | None = None,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Convolution, scan and gate of a Mamba-2 mixer, from the output of its input projection.

    The kernel can also normalize and project the result; the mixer does so itself, and these arguments are left out.

    Args:
        zxbcdt: ``[batch, seq, 2 * channels + 2 * groups * state + heads]``: gate, inputs, ``B``, ``C`` and step sizes
            side by side, where ``channels = heads * head_dim``.
        conv1d_weight: ``[channels + 2 * groups * state, width]``.
        conv1d_bias: ``[channels + 2 * groups * state]``.
        activation: of the convolution: ``"silu"`` or ``"swish"``.
        headdim: channels of a head, where ``D`` does not tell.
        ngroups: number of groups of ``B`` and ``C``.
        norm_before_gate: without effect, as the norm is left to the mixer.
        others: see :func:`mamba_chunk_scan_combined`.

    Returns:
        ``[batch, seq, channels]``, gated.

    Raises:
        NotImplementedError: ``seq_idx`` is given.
    """
    heads = D.size(0)
    channels = D.numel() if headdim is None else heads * headdim
    convolved = conv1d_weight.size(0)
    z, xbc, dt = zxbcdt.split([channels, convolved, heads], dim=-1)
    xbc = causal_conv1d_fn(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation).transpose(1, 2)
    group_channels = (convolved - channels) // 2
    x, B, C = xbc.split([channels, group_channels, group_channels], dim=-1)
    out = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, -1)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, -1)),
        dt_bias=dt_bias,
        dt_softplus=True,
        state_dtype=state_dtype,
    )
    assert isinstance(out, torch.Tensor)  # no final states were asked for
    return out.flatten(-2)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32, unless it is wider."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _for_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """``[batch, seq, groups, state]`` repeated so that there is one for each head."""
    return _wide(tensor).repeat_interleave(heads // tensor.size(2), dim=2)


def _chunks(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """``[batch, seq, ...]`` as ``[batch, chunk, size, ...]``, filled up with zeros."""
    missing = -tensor.size(1) % size
    padding = [0, 0] * (tensor.dim() - 2) + [0, missing]
    return functional.pad(tensor, padding).unflatten(1, (-1, size))


def _within_chunk(log_decay: torch.Tensor, to_state: torch.Tensor, from_state: torch.Tensor) -> torch.Tensor:
    """What each token of a chunk takes from itself and the tokens before it: ``[batch, chunk, head, to, from]``."""
    log_decay = log_decay.transpose(2, 3)
    between = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=between.device).triu(1)
    # Masked before exp: an exponent of a later token may overflow, and infinity times zero has no gradient.
    decay = between.masked_fill(later, -torch.inf).exp()
    return decay * torch.einsum("bcqhn,bckhn->bchqk", from_state, to_state)


def _pass_states(
    added: torch.Tensor, decay: torch.Tensor, initial: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """States before each chunk, ``[batch, chunk, head, head_dim, state]``, and after the last one.

    Args:
        added: what the tokens of each chunk add until its end, ``[batch, chunk, head, head_dim, state]``.
        decay: of a state over each chunk, ``[batch, chunk, head]``.
        initial: before the first chunk, ``[batch, head, head_dim, state]``; zeros by default.
    """
    state = torch.zeros_like(added[:, 0]) if initial is None else initial.to(added.dtype)
    before = []
    for i in range(added.size(1)):
        before.append(state)
        state = decay[:, i, :, None, None] * state + added[:, i]
    return torch.stack(before, dim=1), state


def _refuse_packing(seq_idx: Any) -> None:
    if seq_idx is not None:
        raise NotImplementedError(_NO_PACKING)


_MIXER = "megatron.core.ssm.mamba_mixer"

PATCHES: list[Patch] = [
    Patch(f"{_MIXER}:HAVE_MAMBA_SSM", replace_by(True), "the mixer refuses to be built without mamba-ssm"),
    Patch(f"{_MIXER}:MAMBA_HAS_STATE_DTYPE", replace_by(True), "the scan takes mamba_training_ssm_states_dtype"),
    Patch(f"{_MIXER}:ExtendedRMSNorm", replace_by(GatedRMSNorm), "a subclass of mamba-ssm's norm, a Triton kernel"),
    *(
        Patch(f"{_MIXER}:{function.__name__}", replace_by(function), "a CUDA or Triton kernel")
        for function in (causal_conv1d_fn, mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined)
    ),
    Patch(
        f"{_MIXER}:_check_mamba_sequence_packing_support",
        replace_by(lambda for_inference_not_training=True: (False, _NO_PACKING)),
        "advises to install a newer causal-conv1d, which would not help without a GPU",
    ),
]
