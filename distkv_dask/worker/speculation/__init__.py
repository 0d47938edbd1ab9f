"""Speculation without a draft model: proposes tokens that followed the same words earlier.

May import: numpy, `gang`.
May not touch: torch, the model, channels; the home's decode loop verifies the proposals.
"""
