"""From one rank's shard of a momentum matrix to its shard of the update."""

from megatron_muon.engine.tensor_parallel import MODES, Shard, shard_of, update_direction

__all__ = ["MODES", "Shard", "shard_of", "update_direction"]
