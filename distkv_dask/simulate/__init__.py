"""A discrete-event simulator: the state machine that runs an engine, on modelled workers.

May import: `scheduler` and `messages`.
May not touch: real clocks, Dask, torch.
"""
