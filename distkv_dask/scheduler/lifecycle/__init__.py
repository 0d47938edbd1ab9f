"""Life of a request, from submission until its blocks are free: one state machine for each engine.

May import: every room of the scheduler that is pure (all but `engines`, `tasks`, `dashboard`).
May not touch: clocks, Dask, workers; events and times go in, commands come out.
"""
