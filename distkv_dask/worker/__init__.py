"""What runs in the Dask workers: the rManager, KV pools, lanes, channels and the model.

May import: `messages`, `graphs`, `kernels` and the modules outside of the folders; never `scheduler` or `client`.
May not touch: placements and epochs, which the gManager decides; a worker does what messages and plans say.
"""
