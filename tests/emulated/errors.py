"""What the emulated device raises beside what CUDA's torch would: a fault that a card would show as wrong numbers."""

from __future__ import annotations


class RaceError(RuntimeError):
    """Memory is used by two streams, or by a stream and the host, and nothing orders the two uses."""
