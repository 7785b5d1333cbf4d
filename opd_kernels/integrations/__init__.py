"""Adapters to what surrounds the loss: trainers, one module each, and a teacher's server.

None is imported with the package. ``verl``, ``nemo_rl``, ``swift`` and ``megatron`` import their
trainer where one of their functions is called. ``trl`` needs TRL, and so Python 3.11 or later;
``server`` needs requests: ``pip install ".[trl]"`` in a checkout installs both.
"""
