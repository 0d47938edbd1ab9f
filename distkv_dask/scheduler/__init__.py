"""What runs in the Dask scheduler: the gManager, its ledger and its policy. Never blocks, never imports torch."""
