"""Life of a request, from submission until its blocks are free: one state machine for each engine.

May import: `work`, `cache`, `moves`, `records`, `policies`, `ledger`, `commands` and `messages`.
May not touch: clocks, Dask, workers; events and times go in, commands come out.
"""
