"""Set-up of all tests: no network, one compute thread, and Dask's fixtures that find leftovers."""

from __future__ import annotations

import atexit
import gc
import os
import re
import time
from pathlib import Path

# torch and huggingface_hub read these when they are imported, so they are set first; worker processes inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Only tests of that let an engine time every worker when it opens; they set this.
os.environ["DASK_DISTKV__PERFORMANCE"] = "preset"
# 15 s after a worker's death, a cluster checks whether there is a new one; if that was just killed, too, the cluster
# gives up its nanny.
os.environ["DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT"] = "10 minutes"
# cpu, emulated, or cuda: a real card
os.environ["DASK_DISTKV__DEVICE"] = "cuda" if os.environ.get("DISTKV_TEST_DEVICE", "cpu") != "cpu" else "cpu"
if os.environ.get("DISTKV_TEST_DEVICE") == "emulated":  # workers of all clusters also get the card
    os.environ["DASK_DISTRIBUTED__WORKER__PRELOAD"] = repr(["emulated.preload"])
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]  # where all processes find the preload
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

from tests._forked_workers import fork_workers

# Clusters of tests fork their workers. Commands that a test starts (guide, demo, dask worker) run as for users, and a
# real card needs processes that were not forked. Dask's test module, imported next, keeps the current configuration
# and restores it before each of its clusters.
if os.environ.get("DISTKV_TEST_DEVICE") != "cuda":
    fork_workers()

import pytest
import tqdm
from distributed.utils_test import cleanup, loop, loop_in_thread
from hypothesis import settings

if os.environ.get("DISTKV_TEST_DEVICE") == "emulated":
    import emulated
    from emulated.engine import use_torch_kernels

    emulated.install(memory=6 << 30)  # shared by all workers in this process
    use_torch_kernels()

settings.register_profile("tests", deadline=None)  # a busy machine is not a failure
settings.load_profile("tests")
tqdm.tqdm.monitor_interval = 0  # its monitor thread would look like one that a test left behind

__all__ = ["cleanup", "loop", "loop_in_thread"]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let the thread that watches time limits end at once if there is no limit, because every test waits for it.

    Give tests on the emulated card more time, because a step takes ten times as long there.
    """
    from distkv_dask.client import time_limit

    time_limit.IDLE_SECONDS = 0.02
    if os.environ.get("DISTKV_TEST_DEVICE") == "emulated" and config.getoption("timeout", None) is None:
        config.option.timeout = 900


LIKE_OTHERS = {
    "llama-mha", "llama-mqa", "qwen2", "mistral", "phi3", "mixtral",  # like llama-gqa, qwen3 and qwen3-moe
    "granite4-h", "lfm2", "nemotron-h",  # like qwen3-next and jamba
}  # fmt: skip
"""Tiny models (``_models.py``) that use the same code as another one."""


def pytest_collection_finish() -> None:
    """Exclude current objects from garbage collections, which would take a second each, such as pytest's last ones."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # extensions report objects that are never collected


LONG = "client", "engine"
"""Folders whose tests take most of the time."""

SLOW_MARGIN = 600.0
"""Seconds before the end of the time in which no slow test begins: the longest take minutes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let CI end in time on a machine that is too slow for all tests."""
    parser.addoption("--until", type=float, help="Unix time after which no test begins, and long before it no slow one")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("until")
    margin = SLOW_MARGIN if item.get_closest_marker("slow") else 0.0
    if until is not None and time.time() > until - margin:
        pytest.skip("no time is left for it on this machine")


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files of slow tests, so that no process waits for one at the end; with ``--until`` they come last.

    Leave model families that resemble others to ``make test-thorough``, and all tests over UCX. These get three tries,
    because ucxx occasionally misses time limits on a busy machine.
    """
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and call.params.get("family") in LIKE_OTHERS:
            item.add_marker(pytest.mark.thorough)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    if config.getoption("until") is None:
        items.sort(key=lambda item: item.path not in slow)
    else:
        items.sort(key=lambda item: (item.path in slow, item.path.parent.name in LONG))
    for item in items:
        if item.get_closest_marker("ucx") or re.search(r"\[(.*-)?ucx\b", item.name):
            item.add_marker(pytest.mark.flaky(reruns=2))
            item.add_marker(pytest.mark.thorough)
