"""A server of a tiny model on an in-process cluster, and its clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx
from distributed import Client, LocalCluster
from openai import OpenAI

from distkv_dask.client.listener import listener_at
from distkv_dask.client.serve.app import gate_of
from distkv_dask.client.serve.gate import Limits
from distkv_dask.client.serve.keys import Keys
from distkv_dask.client.serve.server import Server
from distkv_dask.client.serve.serving import Serving
from distkv_dask.client.session.owned_engine import OwnedEngine
from distkv_dask.client.session.session import Session
from distkv_dask.sampling import SamplingParams
from tests._models import text_model_dir

KEY = "a-key-that-nobody-can-guess"
LIMITS = Limits(body_bytes=1 << 20, open_requests=3, drain_seconds=10)


class Served(NamedTuple):
    """A running server."""

    url: str
    serving: Serving
    server: Server

    def openai(self, key: str = KEY) -> OpenAI:
        """OpenAI's own client, without retries."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, key: str | None = KEY) -> httpx.Client:
        """A plain HTTP client."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def idle(self) -> None:
        """Wait until the engine has nothing to do."""
        session = self.serving.session
        until(lambda: not session.client.sync(session.status).sequences)

    def count(self, sample: str) -> float:
        """One of the server's metrics."""
        with self.http() as http:
            lines = http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(sample))


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


@contextmanager
def open_session(workers: int = 2, **settings: Any) -> Iterator[Session]:
    """An engine of a tiny model, with a tokenizer and a chat template."""
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        given = {"kv_memory": "8 MiB", "block_tokens": 8} | settings
        engine = OwnedEngine.of(str(text_model_dir(end=True)), "float32", None, **given)
        with closing(Session(client, engine)) as session:
            yield session


@contextmanager
def served(
    session: Session,
    folder: Path,
    limits: Limits = LIMITS,
    keys: frozenset[str] = frozenset({KEY}),
    adapters: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Served]:
    """A server of an engine."""
    sampling = SamplingParams(max_new_tokens=16, temperature=0.0)
    serving = Serving(session, ["tiny", session.model.name], sampling, limits, adapters)
    listener = listener_at("127.0.0.1", 0)
    server = Server(gate_of(serving, Keys(keys), folder), serving, listener)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(ready.set,))
    thread.start()
    try:
        assert ready.wait(60)
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", serving, server)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
