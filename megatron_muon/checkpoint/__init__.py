"""Optimizer state on disk: one form for every parallel layout.

Every state tensor is saved in the space of the model's own weights, under its name and that of the state, whatever
optimizer, wrapper or layout held it. So it is read at any layout, and by another optimizer.

``param_state`` is what a rank has of a weight, ``sharding`` describes it to ``dist_checkpointing``, ``record`` is
what is stored beside the tensors, ``sources`` decides what is read for which state; ``saving`` and ``request`` use all.
"""
