"""What the emulated device raises beside what CUDA's torch would: a fault that a card would show as wrong numbers."""

from __future__ import annotations


class RaceError(RuntimeError):
    """Memory is used by two streams, or by a stream and the host, and nothing orders the two uses."""


class CaptureError(RuntimeError):
    """A call is not permitted while a stream is being captured into a graph."""


class StaleGraphError(RuntimeError):
    """A graph is replayed, but memory or a number that was baked into it is no longer what it was."""
