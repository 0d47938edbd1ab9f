"""Preload of nannies: workers are forked from a process that has imported everything, so that they start at once."""

import multiprocessing

from distributed.utils import get_mp_context

get_mp_context()  # or Dask sets its own list later
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["distributed", "distkv_dask.worker.startup", "transformers.models.llama.modeling_llama"]
)
