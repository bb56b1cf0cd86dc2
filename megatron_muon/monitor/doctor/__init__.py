"""What is odd in a run, from its record, text and checkpoint, and what to do: ``python -m megatron_muon doctor``."""
