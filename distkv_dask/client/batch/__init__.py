"""Batches: a table or folder of documents in, a table of answers out, and nothing lost on the way."""

from distkv_dask.client.batch.process import BatchSummary, process

__all__ = ["BatchSummary", "process"]
