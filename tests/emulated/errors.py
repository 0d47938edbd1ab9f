"""Errors of the emulated device that torch with CUDA does not raise: on a card these faults give wrong numbers."""

from __future__ import annotations


class RaceError(RuntimeError):
    """Two streams, or a stream and the host, use the same memory, and nothing orders the two uses."""


class CaptureError(RuntimeError):
    """A call is not permitted while a stream is being captured into a graph."""


class StaleGraphError(RuntimeError):
    """A graph is replayed, but memory that it uses, or a number that was captured, is no longer the same."""
