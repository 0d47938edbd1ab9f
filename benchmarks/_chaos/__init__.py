"""Chaos: a mixed load on an engine whose workers are killed, frozen, cut off, joined and retired; what went wrong?"""
