"""Layers over workers: a home computes the first layers of its model, and other workers (stages) the later ones.

May import: `blocks`, `channels`, `home` (attention, exchange, chunks, windows), `model`, and the worker's `plan`.
May not touch: placement; blocks are allocated at the home alone, whose ids name the same tokens in every stage's pool.
"""
