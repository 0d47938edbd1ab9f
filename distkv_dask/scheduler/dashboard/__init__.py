"""What people see of the engines of a cluster: a page on Dask's dashboard, JSON, and Prometheus metrics.

May import: every other room of the scheduler.
May not touch: anything; it only looks.
"""
