"""Engines in the scheduler: opening, closing, handles, figures, status.

May import: `lifecycle`, `moves`, `records`, `costs` and `messages`.
May not touch: Dask's scheduler and its streams; the gManager does that.
"""
