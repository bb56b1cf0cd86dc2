"""Everything that only a GPU can tell, in one command: ``python -m tools.gpu_check`` (``make gpu-check``).

``command`` runs the parts, each in processes of its own, within a budget of minutes, and keeps results in one JSON
file; ``process`` starts and ends them, ``child`` is what runs in them, item after item, ``report`` is what it says;
``targets`` has the numbers that are to be reached, ``page`` writes them as text. What is measured is in ``parts``.

``command``, ``process`` and ``page`` import the standard library alone: a broken torch is a failure like others.
"""
