"""Views of a cluster's engines: a page on Dask's dashboard, JSON, and Prometheus metrics.

May import: `engines`, `lifecycle`, `records`, `ledger` and `messages`.
May not touch: anything; it only reads.
"""
