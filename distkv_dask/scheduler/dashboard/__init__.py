"""What people see of the engines of a cluster: a page on Dask's dashboard, JSON, and Prometheus metrics."""
