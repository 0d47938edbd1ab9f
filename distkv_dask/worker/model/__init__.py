"""The model: loaded with our attention, probed, and what becomes of its logits.

May import: `home` for the hook of attention, transformers, torch.
May not touch: the pool and other workers; the runtime brings them together.
"""
