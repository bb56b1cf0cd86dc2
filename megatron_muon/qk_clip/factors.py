"""What the rows of query and key projections are multiplied by: pure functions of the measured logits.

With S_h the largest logit of head h in the step and tau the threshold, gamma_h = tau / S_h where S_h > tau, and exactly
1 elsewhere (also for negative and missing maxima). The logit is bilinear in the query and key weights, so it is scaled
by the product of their factors.

===================  ==========================================  ======================================
projection           query rows                                  key rows
===================  ==========================================  ======================================
one key head each    gamma_h ^ alpha                             gamma_h ^ (1 - alpha)
shared, ``q_only``   gamma_h                                     1
shared, ``group``    gamma_g ^ alpha                             gamma_g ^ (1 - alpha)
shared, ``exact``    gamma_h / gamma_g ^ (1 - alpha)             gamma_g ^ (1 - alpha)
MLA, nope            gamma_h ^ alpha                             gamma_h ^ (1 - alpha)
MLA, rope            gamma_h                                     1 (shared by all heads)
===================  ==========================================  ======================================

gamma_g is the least gamma of the query heads that share a key head. ``group`` is Megatron-Core's rule, which scales
quiet heads of a group as well; ``exact`` leaves their logits as they are but lets their query weights grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_muon.choices import QK_CLIP_RULES


@dataclass(frozen=True)
class Heads:
    """All attention heads of a model, numbered through its layers, and the places of their factors in the table.

    Attributes:
        group: (heads,) int64, number of the key head (over the whole model) that a query head reads.
        alone: (heads,) bool, whether no other query head reads that key head.
        layer: (heads,) int64, number of the layer.
        layers: how many layers there are.
    """

    group: torch.Tensor
    alone: torch.Tensor
    layer: torch.Tensor
    layers: int

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], device: torch.device | str = "cpu") -> Heads:
        """From (query heads, key heads) of each layer."""
        group, alone, layer = [], [], []
        groups = 0
        for number, (heads, keys) in enumerate(sizes):
            share = heads // keys
            group += [groups + head // share for head in range(heads)]
            alone += [share == 1] * heads
            layer += [number] * heads
            groups += keys
        return cls(
            torch.tensor(group, dtype=torch.int64, device=device),
            torch.tensor(alone, dtype=torch.bool, device=device),
            torch.tensor(layer, dtype=torch.int64, device=device),
            len(sizes),
        )

    @property
    def count(self) -> int:
        """Number of query heads."""
        return self.group.numel()

    ONE = 0
    """Place of the factor 1 in the table."""

    def query(self, head: int) -> int:
        """Place of the factor of a head's query rows."""
        return 1 + head

    def key(self, head: int) -> int:
        """Place of the factor of the key rows that a head reads."""
        return 1 + self.count + head

    def rope(self, head: int) -> int:
        """Place of the factor of a head's query rows that meet a key which all heads share (MLA's rotary part)."""
        return 1 + 2 * self.count + head

    def query_gain(self, layer: int) -> int:
        """Place of the factor of the gain of a norm on a layer's queries."""
        return 1 + 3 * self.count + layer

    def key_gain(self, layer: int) -> int:
        """Place of the factor of the gain of a norm on a layer's keys."""
        return 1 + 3 * self.count + self.layers + layer


def gammas(maxima: torch.Tensor, threshold: float) -> torch.Tensor:
    """``threshold / maxima`` where ``maxima`` is finite and above the threshold, exactly 1 elsewhere.

    Args:
        maxima: (heads,) largest logits; ``-inf`` where nothing was measured.
        threshold: tau, positive.
    """
    above = (maxima > threshold) & maxima.isfinite()
    return torch.where(above, threshold / maxima, torch.ones_like(maxima))


def factor_table(maxima: torch.Tensor, heads: Heads, threshold: float, alpha: float, rule: str) -> torch.Tensor:
    """All factors of a model in the order of :class:`Heads`.

    Args:
        maxima: (heads,) largest logit of each head, over all ranks.
        heads: which heads share keys and layers.
        threshold: tau.
        alpha: share of the factor that queries take, between 0 and 1.
        rule: for heads that share a key head, one of :data:`megatron_muon.choices.QK_CLIP_RULES`.

    Returns:
        (1 + 3 heads + 2 layers,) in the dtype of ``maxima``.

    Raises:
        ValueError: for an unknown rule.
    """
    if rule not in QK_CLIP_RULES:
        raise ValueError(f"rule {rule!r}: choose one of {', '.join(QK_CLIP_RULES)}")
    one = torch.ones_like(maxima)
    gamma = gammas(maxima, threshold)
    least = one.scatter_reduce(0, heads.group, gamma, "amin")[heads.group]
    key = least.pow(1 - alpha)
    if rule == "q_only":
        query = torch.where(heads.alone, gamma.pow(alpha), gamma)
        key = torch.where(heads.alone, key, one)
    elif rule == "group":
        query = least.pow(alpha)
    else:
        # Not gamma / key for lone heads: gamma^alpha is what the table promises, to the last bit.
        query = torch.where(heads.alone, gamma.pow(alpha), gamma / key)
    of_layer = maxima.new_ones(heads.layers).scatter_reduce(0, heads.layer, gamma, "amin")
    return torch.cat([one[:1], query, key, gamma, of_layer.pow(alpha), of_layer.pow(1 - alpha)])
