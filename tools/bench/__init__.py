"""The optimizer step, measured against those of others: ``python -m tools.bench``.

``cases`` and ``model`` tell which weights, ``forms`` gives them to an optimizer in a form that it takes,
``contestants`` lists the optimizers, ``accuracy`` checks their updates, ``observe`` counts what a step holds and sends,
``rounds`` times, ``calibrate`` measures the rates by which our steps are predicted, ``ranks``, ``start`` and ``launch``
run it all on several processes, ``measure`` puts one case together into what ``found`` describes, and ``document``,
``text`` and ``tables`` show it.
"""
