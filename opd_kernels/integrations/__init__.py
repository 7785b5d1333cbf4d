"""Adapters to what surrounds the loss: TRL's trainer (``trl``), a teacher's server (``server``).

Neither is imported with the package. ``pip install "opd_kernels[trl]"`` installs what both need.
"""
