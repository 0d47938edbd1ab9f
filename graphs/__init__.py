"""Builders of Dask graphs for decode windows and prefill chunks: pure functions of requests and placements.

May import: `messages`, the modules outside of the folders, Dask's graphs; for types only: the `worker` of a task.
May not touch: the ledger, workers and clocks; a graph is a pure function of a request and its placement.
"""
