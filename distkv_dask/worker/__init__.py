"""What runs in the Dask workers: the rManager, KV pools, lanes, channels and the model.

May import: `messages`, `models`, `kernels` and the modules outside of the packages.
May not touch: placements and epochs, which the gManager decides; a worker follows messages and plans.
"""
