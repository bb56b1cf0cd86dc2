"""Faults on real processes: nothing is lost, nothing goes on silently, no process is left."""
