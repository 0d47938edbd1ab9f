"""The same attention with one Dask task per layer and worker: slow, visible, and a reference for the fast way.

May import: `blocks`, `kernels`, and the worker's plan and device.
May not touch: channels; tasks carry the bytes here.
"""
