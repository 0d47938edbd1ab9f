"""Clients, scheduler and workers of different versions do not work together, and say which versions they are."""

from __future__ import annotations

import pytest
from _cluster import engine_test
from _models import model_dir
from distributed import Client, Scheduler, Worker

from distkv_dask import ClusterError, Engine
from distkv_dask.client.session import attached_engine, owned_engine
from distkv_dask.version import VERSION
from distkv_dask.worker import rmanager


def test_a_worker_of_another_version_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rmanager, "VERSION", "9.9")

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        with pytest.raises(ClusterError, match=rf"{worker.address} runs distkv-dask 9\.9, the scheduler {VERSION}"):
            async with Engine(client, str(model_dir("llama-gqa"))):
                pass
        assert not scheduler.plugins["distkv"].engines
        assert not worker.plugins["distkv"].engines

    run()


def test_a_client_of_another_version_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        async with Engine(client, str(model_dir("llama-gqa"))):
            monkeypatch.setattr(attached_engine, "VERSION", "0.0.1")
            with pytest.raises(ClusterError, match=rf"client runs distkv-dask 0\.0\.1, the scheduler {VERSION}"):
                await Engine.attach(client=client)
        monkeypatch.setattr(owned_engine, "VERSION", "0.0.1")
        with pytest.raises(ClusterError, match="install the same version"):
            async with Engine(client, str(model_dir("llama-gqa"))):
                pass
        assert not worker.plugins["distkv"].engines

    run()
