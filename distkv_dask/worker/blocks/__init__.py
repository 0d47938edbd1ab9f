"""KV blocks: the pool, moves from pool to pool, and blocks in Arrow files.

May import: kernels (huge pages), and the modules outside of the folders.
May not touch: models, lanes and channels.
"""
