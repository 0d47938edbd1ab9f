"""An engine on a worker without a model: lanes that work when a test says so, and messages to the gManager."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from distkv_dask.config import Config
from distkv_dask.gang import DecodeWindow, Exchanged, Gang, SequenceState, WindowResult
from distkv_dask.messages import from_worker as did
from distkv_dask.messages.names import EngineSpec
from distkv_dask.placement import Endpoint, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.engine import WorkerEngine
from distkv_dask.worker.holder.session import SessionStats

GANG = Gang("engine", 4, "gang-4", 0, "w0", ())
WINDOW = DecodeWindow(GANG, 7, 8, 1.0)
BLOCK = 8
W1 = Endpoint("w1", "host", 5)


class HomeLane:
    """A lane that works at once, or when a test calls :meth:`work`."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.at_once = True

    def submit(self, call: Callable[..., Any], *given: Any) -> Future[Any]:
        self.waiting.append((Future(), lambda: call(*given)))
        future = self.waiting[-1][0]
        if self.at_once:
            self.work()
        return future

    def submit_next(self, call: Callable[..., Any], *given: Any) -> Future[Any]:
        self.waiting.insert(0, (Future(), lambda: call(*given)))
        return self.waiting[0][0]

    def work(self) -> None:
        while self.waiting:
            future, call = self.waiting.pop(0)
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


class HolderLane:
    """A lane that retires sequences when a test says so."""

    def __init__(self) -> None:
        self.retiring: list[tuple[str, int, Future[None]]] = []

    def retire(self, engine: str, sequence: int) -> Future[None]:
        self.retiring.append((engine, sequence, Future()))
        return self.retiring[-1][2]


class Runtime:
    """Computes nothing; ``result`` is the result of a window, or the error that it raises."""

    def __init__(self) -> None:
        self.spec = EngineSpec("engine", "tiny", "float32", "a token", Config.load(timeout_receive=5.0))
        self.pool = Pool(BlockShape(1, 1, 8, "float32", BLOCK), 8)
        self.lanes = SimpleNamespace(home=HomeLane(), holder=HolderLane())
        self.exchanged = Exchanged(1.0, 2.0, 3, 4)
        self.aborted: list[tuple[int, str]] = []
        self.decoded: list[tuple[DecodeWindow, list[int]]] = []
        self.result: Any = WindowResult({5: [8, 9]}, {}, 2, 0.5)
        self.session: Any = SessionStats(3, 10, 20, 0.5)

    def reserve(self, sequence: int, start: int, stop: int) -> None:
        self.pool.reserve(sequence, start, stop)

    def release_sequence(self, sequence: int) -> None:
        self.pool.release_sequence(sequence)

    def abort(self, gang: int, reason: str) -> None:
        self.aborted.append((gang, reason))

    def decode(self, window: DecodeWindow, batch: list[SequenceState]) -> WindowResult:
        self.decoded.append((window, [one.sequence for one in batch]))
        return given_or_raised(self.result)

    def open_session(self, gang: Gang) -> Any:
        return SimpleNamespace(wait=lambda: given_or_raised(self.session))


def given_or_raised(value: Any) -> Any:
    if isinstance(value, BaseException):
        raise value
    return value


class Model:
    """Records the regular expressions that it has to compile."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.adapters = SimpleNamespace(paths=(), nbytes=0)

    def is_prepared(self, sampling: SamplingParams, adapter: object = None) -> bool:
        return sampling.regex is None or sampling.regex in self.compiled

    def prepare(self, sampling: SamplingParams | None, adapter: object = None) -> None:
        if sampling is not None and sampling.regex is not None:
            self.compiled.append(sampling.regex)


class Open:
    """An engine, and the messages that it sent."""

    def __init__(self) -> None:
        self.told: list[did.FromWorker] = []
        self.runtime, self.model = Runtime(), Model()
        facts: Any = SimpleNamespace(worker="w0")
        runtime: Any = self.runtime
        self.engine = WorkerEngine(runtime, self.model, SimpleNamespace(), facts, self.told.append)  # type: ignore[arg-type]

    def join(self, sequence: int = 5, regex: str | None = None, holders: tuple[Endpoint, ...] = (W1,)) -> None:
        sampling = SamplingParams(regex=regex)
        self.engine.join(SequenceState(sequence, (Span("w0", 0, 64),), 10, 7, 50, sampling), holders)
