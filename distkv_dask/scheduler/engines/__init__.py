"""Engines as the scheduler sees them: opening, closing, handles, figures, status.

May import: every other room of the scheduler but the gManager's plugin and `tasks`.
May not touch: Dask's scheduler and its streams; the gManager does that.
"""
