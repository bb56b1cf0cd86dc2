"""Small experiments whose results are committed under ``docs/results``: ``python -m tools.results``."""
