"""In-process Dask clusters for tests: the one module, besides ``conftest.py``, that knows ``distributed.utils_test``.

That module of Dask's is no stable API; should it change, these two files are all there is to adapt.
"""

from __future__ import annotations

from distributed.utils_test import gen_cluster

__all__ = ["gen_cluster"]
