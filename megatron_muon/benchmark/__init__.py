"""The optimizer step, measured against those of others: ``python -m megatron_muon bench``.

``cases`` and ``model`` tell which weights, ``forms`` gives them to an optimizer in a form that it takes,
``contestants`` lists the optimizers, ``accuracy`` checks their updates, ``observe`` counts what a step holds and sends,
``rounds`` times, ``ranks`` and ``launch`` run it all on several processes, ``measure`` puts one case together, and
``document``, ``text`` and ``command`` show the result.
"""
