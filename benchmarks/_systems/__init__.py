"""Comparison with other systems: the cases that all are given, how each is driven in its own process, and results."""
