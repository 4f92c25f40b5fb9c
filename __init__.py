"""Xceptile: a trained Xception as INT8 bundles that mean the same function, bit for bit, on every target."""

__version__ = "0.1.0"
