"""Pallas kernels for TPU, each with a slow twin of the same signature."""
