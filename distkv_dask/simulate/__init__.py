"""A discrete-event simulator: the engine's own state machine on modelled workers.

May import: `scheduler` and `messages`.
May not touch: real clocks, Dask, torch.
"""
