"""Portable kernels, for every processor that has no family of its own."""
