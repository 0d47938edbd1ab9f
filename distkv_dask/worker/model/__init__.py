"""The model: loaded with our attention through a hook, probed; sampling from its logits.

May import: transformers, torch, `models`, and the worker's device.
May not touch: the pool and other workers; the runtime connects them.
"""
