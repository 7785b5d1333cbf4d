"""The operators: they allocate, choose configurations and launch the kernels."""
