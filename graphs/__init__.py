"""Builders of Dask graphs for decode windows and prefill chunks: pure functions of requests and placements."""
