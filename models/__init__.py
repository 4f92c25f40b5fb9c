"""Trained Xception networks and the one graph representation they become: loading, importing, verifying, printing."""
