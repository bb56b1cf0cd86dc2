"""One optimizer step for many weights: planned from shapes, carried out with collectives that overlap the products."""

from megatron_muon.engine.modes import MODES
from megatron_muon.engine.shards import Shard, shard_of
from megatron_muon.engine.step import StepEngine

__all__ = ["MODES", "Shard", "StepEngine", "shard_of"]
