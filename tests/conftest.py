"""What every test gets: no network, one compute thread, Dask's fixtures that notice what is left behind."""

from __future__ import annotations

import atexit
import gc
import os
import re
from pathlib import Path

# Read when torch and huggingface_hub are first imported, hence before all imports; worker processes inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Timing every worker when an engine opens is for the tests of that: they ask for it.
os.environ["DASK_DISTKV__PERFORMANCE"] = "preset"
# 15 s after a worker's death, a cluster looks whether there is a new one; it gives up a nanny whose new one was just
# killed, too.
os.environ["DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT"] = "10 minutes"
# cpu, emulated, or cuda: a real card
os.environ["DASK_DISTKV__DEVICE"] = "cuda" if os.environ.get("DISTKV_TEST_DEVICE", "cpu") != "cpu" else "cpu"
if os.environ.get("DISTKV_TEST_DEVICE") == "emulated":  # workers of all clusters get the card, too
    os.environ["DASK_DISTRIBUTED__WORKER__PRELOAD"] = repr(["emulated.preload"])
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]  # where processes of any kind find that
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

from tests._forked_workers import fork_workers

# Clusters of tests fork their workers. What a test starts by a command (guide, demo, dask worker) is as for users, and
# a real card needs processes that nobody has forked. Dask's module of tests, imported next, keeps the configuration
# that it finds, and sets it again before each of its clusters.
if os.environ.get("DISTKV_TEST_DEVICE") != "cuda":
    fork_workers()

import pytest
import tqdm
from distributed.utils_test import cleanup, loop, loop_in_thread
from hypothesis import settings

if os.environ.get("DISTKV_TEST_DEVICE") == "emulated":
    import emulated
    from emulated.engine import use_torch_kernels

    emulated.install(memory=6 << 30)  # which all workers in this process share
    use_torch_kernels()

settings.register_profile("tests", deadline=None)  # a busy machine is no fault
settings.load_profile("tests")
tqdm.tqdm.monitor_interval = 0  # its monitor thread would look like one that a test left behind

__all__ = ["cleanup", "loop", "loop_in_thread"]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let the thread that watches time limits end at once where there is none: every test waits for it.

    Give tests on the emulated card more time: a step takes ten times as long there.
    """
    from distkv_dask.client import time_limit

    time_limit.IDLE_SECONDS = 0.02
    if os.environ.get("DISTKV_TEST_DEVICE") == "emulated" and config.getoption("timeout", None) is None:
        config.option.timeout = 900


LIKE_OTHERS = {
    "llama-mha", "llama-mqa", "qwen2", "mistral", "phi3", "mixtral",  # like llama-gqa, qwen3 and qwen3-moe
    "granite4-h", "lfm2", "nemotron-h",  # like qwen3-next and jamba
}  # fmt: skip
"""Tiny models (``_models.py``) for which our code does what it does for another one."""


def pytest_collection_finish() -> None:
    """Leave what is there now alone: each garbage collection, such as pytest's last ones, takes a second with it."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # extensions complain of what is never collected


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files of slow tests, so that no process waits for one at the end.

    Leave families of models that are like others to ``make test-thorough``, and all that goes over UCX, which gets
    three tries: ucxx misses time limits now and then on a busy machine.
    """
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and call.params.get("family") in LIKE_OTHERS:
            item.add_marker(pytest.mark.thorough)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if item.get_closest_marker("ucx") or re.search(r"\[(.*-)?ucx\b", item.name):
            item.add_marker(pytest.mark.flaky(reruns=2))
            item.add_marker(pytest.mark.thorough)
