"""MuonClip's QK-clip: keeps attention logits below a threshold by scaling query and key weights.

Kimi K2 (arXiv 2507.20534, section 2.1). Each step, the largest pre-softmax logit of every head is measured in the
forward passes (:mod:`.measure`); after the optimizer's update, heads above the threshold have the rows of their query
and key projections multiplied by a factor below one (:mod:`.factors`, :mod:`.rows`). It works with any optimizer.
"""

from megatron_muon.qk_clip.measure import record

__all__ = ["record"]
