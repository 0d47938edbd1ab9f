"""Speculation without a draft model: what a text says already is proposed as what comes next.

May import: numpy, `gang`.
May not touch: torch, the model, channels; the home's decode loop verifies what is proposed.
"""
