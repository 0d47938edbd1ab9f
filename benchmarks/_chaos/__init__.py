"""Chaos: a mixed load on an engine whose workers are killed, frozen, cut off, added and retired."""
