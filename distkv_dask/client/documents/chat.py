"""A conversation about a document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distkv_dask.client.documents.adapted import with_adapter
from distkv_dask.client.documents.kept import Kept
from distkv_dask.client.documents.prompts import Question, Turn
from distkv_dask.client.session.generation import Generation
from distkv_dask.client.session.session import Session
from distkv_dask.completion import Completion
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import SamplingParams

if TYPE_CHECKING:
    from distkv_dask.client.documents.document import Document


class Chat(Kept):
    """A conversation about a document: each turn's KV is kept and shared by the next one.

    It is a context manager that frees the turns at the end; the document stays.
    """

    def __init__(self, document: Document, session: Session) -> None:
        self.document = document
        self._session = session
        self.turns: list[Turn] = []
        """Questions and answers so far."""
        self._numbers: list[int] = []
        self._asking = False

    def ask(self, question: Question, sampling: SamplingParams | None = None) -> Any:
        """Ask the next question; returns the :class:`Completion`. A failed question is not a turn and can be repeated.

        Raises
        ------
        InvalidRequestError
            When the question cannot be served, or the last one has not been answered yet.
        DistKVError
            When the question fails.
        """
        self.document.check_open()
        if self._asking:
            raise InvalidRequestError("wait for the answer to the last question of the chat before you ask the next")
        last = self._numbers[-1] if self._numbers else self.document.number
        ids = self.document.prompt(question, self.turns)
        sampling = with_adapter(sampling, self.document, self._session)
        request = self._session.submit_ids(ids, sampling, None, last, keeps=True, text=self.document.text)
        self._asking = True
        return self._session.client.sync(self._add_turn, question, request.number, request.generation)

    async def _add_turn(self, question: Question, number: int, generation: Generation) -> Completion:
        try:
            done = await generation
        finally:
            self._asking = False
        self._numbers.append(number)
        self.turns.append((question, done.text, done.token_ids))
        return done

    def close(self) -> Any:
        """Free the turns."""
        return self._leave()

    async def _end(self) -> None:
        numbers, self._numbers = self._numbers, []
        if numbers:
            await self._session.store.release_documents(*numbers)
