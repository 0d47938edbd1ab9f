"""The model: loaded with our attention through a hook, probed, and what becomes of its logits.

May import: transformers, torch.
May not touch: the pool and other workers; the runtime brings them together.
"""
