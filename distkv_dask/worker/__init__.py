"""What runs in the Dask workers: the rManager, KV pools, lanes, channels and the model."""
