"""Commands start one worker for each card if there are any, or say why they do not."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from distributed import LocalCluster
from distributed.system import MEMORY_LIMIT

from distkv_dask.client.commands import connect


class CardCluster(LocalCluster):
    """Stands for dask-cuda's cluster."""


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(connect, "_cards", lambda: 2)


@pytest.fixture
def dask_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("dask_cuda")
    module.LocalCUDACluster = CardCluster
    monkeypatch.setitem(sys.modules, "dask_cuda", module)


@pytest.mark.usefixtures("cards", "dask_cuda")
def test_cards_get_a_worker_each() -> None:
    with connect.local_cluster(1, 1, None, processes=False, dashboard_address=None) as cluster:
        assert isinstance(cluster, CardCluster)


@pytest.mark.usefixtures("cards", "dask_cuda")
@pytest.mark.parametrize("visible", ["", "-1", " "])
def test_hidden_cards_do_not_count(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert connect._kind_of_cluster() is LocalCluster


@pytest.mark.usefixtures("dask_cuda")
def test_a_machine_without_cards_gets_what_dask_gives() -> None:
    assert connect._kind_of_cluster() is LocalCluster


@pytest.mark.usefixtures("cards")
def test_without_dask_cuda_there_is_one_worker_for_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with connect.local_cluster(None, 1, None, processes=False, dashboard_address=None) as cluster:
        assert len(cluster.workers) == 1


def test_workers_of_a_machine_have_the_weights_that_they_share_in_their_limit() -> None:
    weights = MEMORY_LIMIT // 2
    with connect.local_cluster(2, 1, None, weights, processes=False, dashboard_address=None) as cluster:
        for worker in cluster.workers.values():
            assert worker.memory_manager.memory_limit == pytest.approx(MEMORY_LIMIT * 3 / 4, rel=1e-6)


@pytest.mark.usefixtures("cards")
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(connect, "note", said.append)
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    assert connect._kind_of_cluster() is LocalCluster
    assert "distkv-dask[gpu]" in said[0]
