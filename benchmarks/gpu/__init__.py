"""A GPU's quarter of an hour: ``python benchmarks/gpu --part 1``, then ``--part 2``."""
