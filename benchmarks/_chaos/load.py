"""The load: users who send requests of all kinds, one after the other, and check every answer."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from _chaos.questions import Question, Questions, Text
from _chaos.records import Record, Records
from _chaos.schedule import Errand, errands, picked
from distkv_dask import Completion, Document, Engine, SamplingParams
from distkv_dask.client.session.generation import Generation

URGENT = 50
"""Priority of a request that takes memory from others."""


class Load:
    """Users of one engine, each in a thread.

    Parameters
    ----------
    engine
        The engine.
    questions
        What users ask.
    records
        Collects outcomes.
    folder
        Folder for saved documents.
    """

    def __init__(self, engine: Engine, questions: Questions, records: Records, folder: Path) -> None:
        self._engine = engine
        self._questions = questions
        self.records = records
        self._folder = folder
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._names = itertools.count()
        self._saved: list[tuple[Path, Text]] = []
        self._shelf: list[tuple[Document, Text]] = []
        """Documents that all users ask about during the whole run."""

    def start(self, seed: int, users: int) -> None:
        """Ingest the shared documents, and start the users."""
        for text in self._questions.shared:
            self._shelf.append((self._engine.ingest(text.text, text.name), text))
        for user in range(users):
            self.spawn(self._use, errands(seed, user))

    def spawn(self, work: Callable[..., None], *arguments: object) -> None:
        """Run something in its own thread."""
        thread = threading.Thread(target=self._guarded, args=(work, *arguments), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self.records.failed(self.records.begin("user", work.__name__), error)

    def stop(self) -> None:
        """Send no more requests."""
        self._stopping.set()

    def is_over(self) -> bool:
        """Whether all requests have ended."""
        return not any(thread.is_alive() for thread in list(self._threads))

    def release(self) -> None:
        """Release the shared documents."""
        for document, _ in self._shelf:
            document.release()

    # Actions of users

    def _use(self, plan: Iterable[Errand]) -> None:
        for errand in plan:
            if self._stopping.is_set():
                return
            getattr(self, "_" + errand.kind.replace("-", "_"))(errand.kind, errand.pick)

    def _plain(self, kind: str, pick: float) -> None:
        self._ask(kind, [picked(self._questions.plain, pick)], self._submit)

    def _wide(self, kind: str, pick: float) -> None:
        self._ask(kind, [picked(self._questions.wide, pick)], self._submit)

    def _sampled(self, kind: str, pick: float) -> None:
        self._ask(kind, [picked(self._questions.sampled, pick)], self._submit)

    def _schema(self, kind: str, pick: float) -> None:
        self._ask(kind, [picked(self._questions.schema, pick)], self._submit)

    def _too_large(self, kind: str, pick: float) -> None:
        question = picked(self._questions.too_large, pick)
        self.records.refused(self.records.begin(kind, question.name), lambda: self._submit(question, question.sampling))

    def _stream(self, kind: str, pick: float) -> None:
        question = picked([*self._questions.plain, *self._questions.sampled], pick)
        for record in self.records.attempts(kind, question.name):
            self.records.compare(record, question, partial(self._read, record, question))

    def _read(self, record: Record, question: Question) -> Completion:
        pieces = self._engine.stream(question.prompt, question.sampling)
        self._track(record, pieces._generation)
        text = "".join(pieces)
        assert pieces.completion is not None
        if text != pieces.completion.text:
            self.records.end(record, "wrong", f"streamed {text!r}, but the answer is {pieces.completion.text!r}")
        return pieces.completion

    def _shared(self, kind: str, pick: float) -> None:
        self._ask_document(kind, *picked(self._shelf, pick))

    def _document(self, kind: str, pick: float) -> None:
        text = picked(self._questions.documents, pick)
        document = self._have("ingest", text.name, lambda: self._engine.ingest(text.text, self._name(text.name)))
        if document is not None:
            self._ask_document(kind, document, text)
            document.release()

    def _chat(self, kind: str, pick: float) -> None:
        text = picked(self._questions.chats, pick)
        document = self._have("ingest", text.name, lambda: self._engine.ingest(text.text, self._name(text.name)))
        if document is None:
            return
        with document, document.chat() as chat:
            for asked, question in zip(text.asked, text.questions, strict=True):
                for record in self.records.attempts(kind, question.name):
                    self.records.compare(record, question, partial(chat.ask, asked, question.sampling))
                if record.outcome != "completed":
                    return

    # Faults of the load

    def cancel(self, pick: float) -> str:
        """Cancel a running request."""
        able = [one for one in self.records.open() if one.generation is not None]
        if not able:
            return "nothing: no request is running"
        record = picked(able, pick)
        record.unwanted = True
        assert record.generation is not None
        record.generation.cancel()
        return f"{record.kind} request {record.number}"

    def squeeze(self, pick: float) -> str:
        """Send a large and urgent request."""
        question = picked(self._questions.wide, pick)
        self.spawn(self._ask, "squeeze", [question], self._submit, URGENT)
        return question.name

    def save(self, pick: float) -> str:
        """Save a document that others use."""
        document, text = picked(self._shelf, pick)
        place = self._folder / self._name(text.name)
        self.spawn(self._save, document, text, place)
        return f"{text.name} in {place.name}"

    def load(self, pick: float) -> str:
        """Load a saved document, and ask about it."""
        if not self._saved:
            return "nothing: no document has been saved yet"
        place, text = picked(self._saved, pick)
        self.spawn(self._load, place, text)
        return place.name

    def _save(self, document: Document, text: Text, place: Path) -> None:
        for record in self.records.attempts("save", place.name):
            self.records.run(record, lambda: document.save(place))
        if record.outcome == "completed":
            self._saved.append((place, text))

    def _load(self, place: Path, text: Text) -> None:
        document = self._have("load", place.name, lambda: self._engine.load(place, self._name(text.name)))
        if document is not None:
            self._ask_document("loaded", document, text)
            document.release()

    # Requests

    def _name(self, name: str) -> str:
        return f"{name}-{next(self._names)}"

    def _have(self, kind: str, name: str, work: Callable[[], Document]) -> Document | None:
        document: Document | None = None
        for record in self.records.attempts(kind, name):
            document = self.records.run(record, work)
        return document

    def _submit(self, question: Question, sampling: SamplingParams) -> Generation:
        return self._engine.submit(question.prompt, sampling)

    def _ask_document(self, kind: str, document: Document, text: Text) -> None:
        words = dict(zip((one.name for one in text.questions), text.asked, strict=True))
        self._ask(kind, text.questions, lambda one, sampling: document.submit(words[one.name], sampling))

    def _ask(
        self,
        kind: str,
        questions: Iterable[Question],
        submit: Callable[[Question, SamplingParams], Generation],
        priority: int = 0,
    ) -> None:
        """Send several requests at once, and repeat each as long as it fails legitimately."""
        under_way = []
        for question in questions:
            attempts = self.records.attempts(kind, question.name)
            record = next(attempts)
            under_way.append((question, attempts, record, self._begin(record, question, submit, priority)))
        for question, attempts, record, wait in under_way:
            self.records.compare(record, question, wait)
            for again in attempts:
                self.records.compare(again, question, self._begin(again, question, submit, priority))

    def _begin(
        self,
        record: Record,
        question: Question,
        submit: Callable[[Question, SamplingParams], Generation],
        priority: int,
    ) -> Callable[[], Completion]:
        try:
            generation = submit(question, replace(question.sampling, priority=priority))
        except Exception as error:
            return partial(_raise, error)
        self._track(record, generation)
        return generation.result

    def _track(self, record: Record, generation: Generation) -> None:
        record.generation = generation
        requests = dict(self._engine._session.conversation._requests)
        record.number = next((n for n, one in requests.items() if one.generation is generation), None)


def _raise(error: Exception) -> Completion:
    raise error
