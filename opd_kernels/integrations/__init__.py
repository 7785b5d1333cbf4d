"""Adapters to what surrounds the loss: TRL's trainer (``trl``), a teacher's server (``server``).

Neither is imported with the package. ``trl`` needs TRL, and so Python 3.11 or later; ``server``
needs requests. ``pip install ".[trl]"`` in a checkout installs both.
"""
