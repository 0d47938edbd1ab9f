"""Clusters of tests fork all their workers, because imports would take seconds of a core for each."""

from __future__ import annotations

import os

import pytest
from distributed.utils import get_mp_context

from tests._cluster import reset_config


@pytest.mark.skipif(os.environ.get("DISTKV_TEST_DEVICE") == "cuda", reason="a real card needs processes of its own")
def test_workers_are_forked_after_dask_has_set_its_own_configuration() -> None:
    reset_config()  # as each of its clusters does
    assert get_mp_context().get_start_method() == "forkserver"
