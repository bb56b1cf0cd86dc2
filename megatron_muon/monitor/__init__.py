"""Scalars of a run: recording, progress, plots.

``recorder`` writes one JSON line per logged iteration and per evaluation of any Megatron training run; ``metrics``
reads such a file back and compares finished runs; ``progress`` shows a bar of a run in progress, ``sheet`` says
which numbers of runs are shown, ``plots`` and ``page`` draw them.
"""
