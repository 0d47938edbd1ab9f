"""Rows in, answers out, as they finish: a bounded number of requests in flight, and retries after lost workers.

An error in one row is an error of that row alone (:meth:`Runner._row`). Only two errors end the batch: the engine was
closed, or the source cannot be read any further. Rows answered by then are returned first.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distkv_dask.client.batch.answer_plan import Answer, Plan, plan_answer
from distkv_dask.client.batch.row_documents import RowDocument, RowDocuments
from distkv_dask.client.batch.rows import Content, Row
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.completion import Completion
from distkv_dask.errors import (
    ChannelError,
    DistKVError,
    EngineClosedError,
    GangAbortedError,
    SourceError,
    WorkerLostError,
    in_words,
)
from distkv_dask.sampling import SamplingParams

if TYPE_CHECKING:
    from distkv_dask.client.session.generation import Generation
    from distkv_dask.client.session.session import Session

LOST = (WorkerLostError, GangAbortedError, ChannelError)
"""Errors of the cluster, not of the row: the request is tried again."""

RETRIES = 2
"""Retries of a request together with others. Then it is tried once alone, because it may be what kills the workers."""

TICK = 1.0
"""Seconds after which a caller learns that nothing has finished."""

GATHER = 256
"""Rows that finish without a request (those with errors) are returned in groups of this size."""

Flying = tuple[int | str, int, int]
"""A request that has not ended: the label of its row, tokens of its prompt, and most tokens of its answer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished row and question: an answer or an error, and the seconds since the row's first request.

    ``values`` are the answer's properties, if answers follow a JSON schema. An answer that cannot be parsed is kept
    next to the error.
    """

    row: Row
    question: str | None
    seconds: float
    answer: Answer | None = None
    error: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Work:
    """A question about a row, being answered."""

    row: Row
    question: str | None
    began: float
    sampling: SamplingParams
    text: str | None = None
    document: RowDocument | None = None
    plan: Plan | None = None
    waiting: int = 0
    done: list[Completion | None] = field(default_factory=list)
    over: bool = False


@dataclass(slots=True)
class _Ask:
    """One request of a question."""

    work: _Work
    place: int
    prompt: list[int]
    sampling: SamplingParams
    failures: int = 0


class Runner:
    """Answers rows with an engine.

    Parameters
    ----------
    session
        An open session.
    spec
        The batch's settings.
    in_flight
        Requests that the engine has at once.
    """

    def __init__(self, session: Session, spec: BatchSpec, in_flight: int) -> None:
        self._session = session
        self._spec = spec
        self._in_flight = in_flight
        self._documents = RowDocuments(session, spec)
        self._ready: deque[_Ask] = deque()
        self._suspects: deque[_Ask] = deque()
        self._running: dict[Generation, _Ask] = {}
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outcomes: list[Outcome] = []
        self._broken: DistKVError | None = None

    @property
    def flying(self) -> list[Flying]:
        """Requests that have not ended."""
        asks = (*self._running.values(), *self._ready, *self._suspects)
        return [(one.work.row.label, len(one.prompt), one.sampling.new_tokens) for one in asks]

    def run(self, todo: Iterator[tuple[Row, str | None]]) -> Generator[list[Outcome]]:
        """Answer everything; yields what has finished (possibly nothing) at least every :data:`TICK` seconds.

        Closing the iterator cancels what is in flight.

        Raises
        ------
        EngineClosedError
            When the engine is closed or its scheduler is gone.
        SourceError
            When ``todo`` raises it or an error of another library, once all open requests have been answered.
        """
        try:
            while True:
                ended: DistKVError | None = None
                try:
                    self._fill(todo)
                    if self._running:
                        self._collect()
                    elif not self._outcomes:
                        ended = self._broken
                        if ended is None:
                            return
                except DistKVError as error:
                    ended = error
                except Exception as error:
                    ended = DistKVError(f"the batch cannot continue: {in_words(error)}")
                    ended.__cause__ = error
                finished, self._outcomes = self._outcomes, []
                yield finished
                if ended is not None:
                    raise ended
        finally:
            for generation in list(self._running):
                generation.cancel()
            self._documents.close()

    @contextlib.contextmanager
    def _row(self, work: _Work) -> Iterator[None]:
        """All work for one row happens in this context, so that an exception becomes an error of that row alone."""
        try:
            yield
        except EngineClosedError:
            raise
        except Exception as error:
            self._end(work, error=error)

    def _fill(self, todo: Iterator[tuple[Row, str | None]]) -> None:
        """Submit requests up to the limit in flight."""
        while len(self._running) < self._in_flight and len(self._outcomes) < GATHER:
            if self._suspects:
                if not self._running:
                    self._submit(self._suspects.popleft())
                return
            if self._ready:
                self._submit(self._ready.popleft())
            elif (next_one := self._next(todo)) is not None:
                self._start_row(*next_one)
            else:
                self._documents.finish()
                return

    def _next(self, todo: Iterator[tuple[Row, str | None]]) -> tuple[Row, str | None] | None:
        """The next question; None after the last one, and after an error of the source."""
        if self._broken is not None:
            return None
        try:
            return next(todo, None)
        except DistKVError as error:
            self._broken = error
        except Exception as error:
            self._broken = SourceError(f"the source cannot be read any further: {in_words(error)}")
            self._broken.__cause__ = error
        return None

    def _start_row(self, row: Row, question: str | None) -> None:
        work = _Work(row, question, time.monotonic(), self._spec.sampling)
        with self._row(work):
            content: Content = row.read()
            work.sampling = self._spec.sampling_for(content)
            if content.prompt is None:
                work.text = str(content.values[self._spec.text_column])
            work.document = self._documents.begin_question(row, content, work.sampling.adapter)
            window = self._session.facts.max_positions
            work.plan = plan_answer(content, question, self._spec, self._session.tokenizer, window)
            self._advance(work, None)

    def _advance(self, work: _Work, done: list[Completion] | None) -> None:
        """Continue a question with the completions that it waited for."""
        assert work.plan is not None
        try:
            asked = next(work.plan) if done is None else work.plan.send(done)
        except StopIteration as stop:
            self._end(work, answer=stop.value)
        else:
            work.done, work.waiting = [None] * len(asked.prompts), len(asked.prompts)
            sampling = work.sampling if asked.last else work.sampling.without_form()
            self._ready.extend(_Ask(work, place, prompt, sampling) for place, prompt in enumerate(asked.prompts))

    def _end(self, work: _Work, answer: Answer | None = None, error: BaseException | None = None) -> None:
        if not work.over:
            work.over = True
            self._documents.ended(work.document)
            text = None if error is None else in_words(error)
            seconds = time.monotonic() - work.began
            self._outcomes.append(Outcome(work.row, work.question, seconds, answer, text))

    def _submit(self, ask: _Ask) -> None:
        if ask.work.over:  # another part of the document has failed
            return
        with self._row(ask.work):
            shared = None if ask.failures else ask.work.document  # a failed request is tried alone
            number = None if shared is None else shared.number
            generation = self._session.ask_ids(ask.prompt, ask.sampling, document=number, text=ask.work.text)
            self._running[generation] = ask
            generation.add_done_callback(self._ended.put)

    def _collect(self) -> None:
        """Wait for a request to end, and take all that have ended."""
        with contextlib.suppress(queue.Empty):
            generation = self._ended.get(timeout=TICK)
            while True:
                self._add_answer(self._running.pop(generation), generation)
                generation = self._ended.get_nowait()

    def _add_answer(self, ask: _Ask, generation: Generation) -> None:
        if generation.cancelled():
            raise EngineClosedError("the engine was closed while the batch ran")
        error = generation.exception()
        if error is None:
            work = ask.work
            work.done[ask.place] = generation.result()
            work.waiting -= 1
            if not work.waiting and not work.over:
                with self._row(work):
                    self._advance(work, [one for one in work.done if one is not None])
        elif isinstance(error, EngineClosedError):
            raise error
        elif isinstance(error, LOST) and ask.failures <= RETRIES:
            ask.failures += 1
            (self._ready if ask.failures <= RETRIES else self._suspects).append(ask)
        else:
            self._end(ask.work, error=error)
