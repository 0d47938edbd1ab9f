"""KV blocks: the pool, copies from pool to pool, and blocks in Arrow files.

May import: `kernels` (huge pages), `messages`, and the worker's `device`; for types only: files of a `home`.
May not touch: models, lanes and channels.
"""
