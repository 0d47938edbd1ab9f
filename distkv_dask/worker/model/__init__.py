"""The model: loaded with our attention through a hook, probed; sampling from its logits.

May import: transformers, torch, `models`, the worker's `device`, and `kernels`' products of few rows.
May not touch: the pool and other workers; the runtime connects them.
"""
