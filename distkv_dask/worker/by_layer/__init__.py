"""The same attention with one Dask task per layer and worker: slow, visible, and a reference for the fast way.

May import: `blocks`, `kernels`, and modules of the `worker` beside it.
May not touch: channels; tasks carry the bytes here.
"""
