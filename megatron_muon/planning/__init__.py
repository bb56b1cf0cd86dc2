"""What a training run with Muon will do and cost, told from its flags alone, without GPUs.

``flags`` parses the command line, ``model`` builds each pipeline stage on the meta device, ``ownership`` asks
Megatron-Core who holds which optimizer state, ``steps`` asks the step engine what a rank does, ``cost`` sums up what it
holds and does, ``survey`` puts them together, and ``text``, ``document`` and ``command`` show the result.
"""
