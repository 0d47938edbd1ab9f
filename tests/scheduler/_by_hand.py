"""The gManager without Dask: a scheduler whose workers, streams and tasks are lists that a test inspects."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from distributed.core import Status

from distkv_dask.config import Config
from distkv_dask.geometry import Geometry
from distkv_dask.messages.from_worker import FromWorker, Opened
from distkv_dask.messages.names import MEMORY_RESOURCE, PLUGIN, EngineSpec, unpack
from distkv_dask.messages.to_worker import ToWorker
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.dispatch import Dispatcher
from distkv_dask.scheduler.engines.engine import EngineState
from distkv_dask.scheduler.gmanager import GManager
from distkv_dask.version import VERSION

GEOMETRY = Geometry(2, 4, 2, 8, 100, 1000, "float32")
ENGINE = "engine"


class Tasks:
    """Replaces the submitter: records its calls in order."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.ended = (0, 0)

    async def open(self) -> None:
        self.asked.append(("open",))

    async def close(self) -> None:
        self.asked.append(("close",))

    async def drained(self, engine: str, limit: float) -> None:
        self.asked.append(("drained", engine))

    @contextmanager
    def together(self) -> Iterator[None]:
        yield

    def submit(self, graph: Any, gangs: Any, patience: float = 0.0, span: Any = None) -> None:
        self.asked.append(("submit", sorted(graph.tasks), [gang.number for gang in gangs], patience, span))

    def forget_tasks(self, gang: Any, finished: bool) -> None:
        self.asked.append(("forget", gang.number, finished))

    def hurry(self, home: str) -> None:
        self.asked.append(("hurry", home))

    def cancel(self, engine: str) -> None:
        self.asked.append(("cancel", engine))

    def worker_lost(self, worker: str, engine: str | None = None) -> None:
        self.asked.append(("lost", worker, engine))

    def transition(self, key: str, finish: str) -> None:
        self.asked.append((key, finish))


class DaskByHand:
    """The parts of Dask's scheduler that the gManager uses; ``sent`` has the messages to workers."""

    def __init__(self, *workers: str, memory: Sequence[str] = ()) -> None:
        self.workers: dict[str, Any] = {}
        self.stream_comms: dict[str, Any] = {}
        self.clients = dict.fromkeys(("client", "guest", "c1", "c2"))
        self.extensions: dict[str, Any] = {}
        self.handlers: dict[str, Any] = {"retire_workers": self.retire_workers}
        self.stream_handlers: dict[str, Any] = {}
        self.metadata: dict[str, Any] = {}
        self.sent: list[ToWorker] = []
        self.logged: list[dict[str, Any]] = []
        self.retired: list[str] = []
        self.plugin_status = "OK"
        for worker in (*workers, *memory):
            self.join(worker, memory=worker in memory)

    def join(self, worker: str, memory: bool = False) -> None:
        resources = {MEMORY_RESOURCE: 1} if memory else {}
        self.workers[worker] = SimpleNamespace(
            address=worker, name=f"name-{worker}", resources=resources, status=Status.running
        )
        self.stream_comms[worker] = None

    def leave(self, worker: str) -> None:
        del self.workers[worker], self.stream_comms[worker]

    def worker_send(self, worker: str, message: dict[str, Any]) -> None:
        self.sent.append(unpack(message["message"]))

    def log_event(self, topic: str, message: dict[str, Any]) -> None:
        assert topic == PLUGIN
        self.logged.append(message)

    def set_metadata(self, keys: Sequence[str], value: Any) -> None:
        self.metadata[keys[0]] = value

    async def register_worker_plugin(self, comm: Any, plugin: bytes, name: str, idempotent: bool) -> dict[str, Any]:
        return {worker: {"status": self.plugin_status} for worker in self.workers}

    async def unregister_worker_plugin(self, comm: Any, name: str) -> None:
        self.metadata[f"without {name}"] = True

    async def retire_workers(self, workers: list[str], **options: Any) -> dict[str, Any]:
        self.retired += workers
        return dict.fromkeys(workers, options)

    def workers_to_close(self, **options: Any) -> list[str]:
        return list(self.workers)[: options["n"]]

    def to(self, worker: str) -> list[str]:
        """Kinds of the messages that a worker was sent."""
        return [type(one).__name__ for one in self.sent if one.worker == worker]


async def started(dask: DaskByHand) -> GManager:
    """A gManager whose workers have all reported their versions."""
    manager = GManager()
    await manager.start(dask)  # type: ignore[arg-type]
    without_tasks(manager.dispatcher)
    for worker in dask.workers:
        manager.worker_event(worker, VERSION)
    return manager


def without_tasks(dispatcher: Dispatcher) -> Tasks:
    """Use a dispatcher without a Dask client, and without pages."""
    dispatcher.submitter = tasks = Tasks()  # type: ignore[assignment]
    dispatcher.board.start = dispatcher.board.stop = lambda: None  # type: ignore[method-assign]
    return tasks


def spec(engine: str = ENGINE, **settings: Any) -> EngineSpec:
    return EngineSpec(engine, "a model", "float32", "secret", Config.load(**{"block_tokens": 4} | settings))


def opened(worker: str, role: str = "instance", blocks: int = 8) -> Opened:
    sizes = {"capacity_blocks": blocks, "block_bytes": 1024, "spill_bytes": 0, "host_bytes": 0, "places": 64}
    said = {"channels": "", "device": "cpu", "fingerprint": "f", "measured": None, "kernels": "", "weights": ""}
    return Opened(worker, Endpoint(worker, "h", 1), role=role, geometry=GEOMETRY, **sizes, **said)  # type: ignore[arg-type]


def say(manager: GManager, *messages: FromWorker, engine: str = ENGINE) -> None:
    """Deliver messages of workers, as Dask's streams do."""
    for message in messages:
        manager.worker_event(message.worker, VERSION, engine, message)


async def open_engine(manager: GManager, *answers: FromWorker, engine: str = ENGINE, **settings: Any) -> Any:
    """Open an engine for a client; workers answer at once."""
    opening = asyncio.ensure_future(manager.open(spec(engine, **settings), "client", VERSION))
    for answer in answers:
        await until(lambda asked=answer.worker: engine in manager.engines and manager.engines[engine].knows(asked))
        say(manager, answer, engine=engine)
    return await opening


async def until(done: Any) -> None:
    for _ in range(1000):
        if done():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not happen")


async def open_on(dask: DaskByHand, **settings: Any) -> tuple[GManager, EngineState, Tasks]:
    """A gManager with an engine that is open on all workers."""
    manager = await started(dask)
    instances = [worker for worker, state in dask.workers.items() if not state.resources]
    memory = [worker for worker in dask.workers if worker not in instances]
    answers = [*map(opened, instances), *(opened(worker, "memory") for worker in memory)]
    await open_engine(manager, *answers, **settings)
    return manager, manager.engines[ENGINE], manager.dispatcher.submitter  # type: ignore[return-value]
