"""Several questions about each row: their prompts' common prefix is computed once, and kept until all are answered."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from distkv_dask.client.batch.rows import Content, Row
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.documents.prompts import common_length, prompt_ids
from distkv_dask.client.tokenizer import Tokenizer

if TYPE_CHECKING:
    from distkv_dask.client.session.session import Session


@dataclass(slots=True, eq=False)
class RowDocument:
    """A row's document: its number at the engine, and the number of its open questions (``more`` may follow)."""

    number: int
    open: int = 0
    more: bool = True


class RowDocuments:
    """Documents of the rows that are being answered; questions of one row are consecutive.

    Parameters
    ----------
    session, spec
        The batch's.
    """

    def __init__(self, session: Session, spec: BatchSpec) -> None:
        self._session = session
        self._spec = spec
        self._row: Row | None = None
        self._last: RowDocument | None = None
        self._held: set[RowDocument] = set()

    def begin_question(self, row: Row, content: Content, adapter: str | PathLike[str] | None) -> RowDocument | None:
        """A question about a row begins, asked with an adapter or without one.

        Returns the document that it shares with the others, if there is one.
        """
        if len(self._spec.questions) < 2 or content.prompt is not None:
            return None
        if self._row is not row:
            self.finish()
            window = self._session.facts.max_positions
            ids = shared_prefix(content, self._spec, self._session.tokenizer, window)
            self._row = row
            if len(ids) >= self._session.config.block_tokens:
                operation = self._session.store.begin_ingest(ids, adapter=self._session.adapter(adapter))
                self._last = RowDocument(operation.number)
                self._held.add(self._last)
        if self._last is not None:
            self._last.open += 1
        return self._last

    def ended(self, document: RowDocument | None) -> None:
        """A question has ended."""
        if document is not None:
            document.open -= 1
            self._release_if_unused(document)

    def finish(self) -> None:
        """The last row has no more questions."""
        if self._last is not None:
            self._last.more = False
            self._release_if_unused(self._last)
        self._row = self._last = None

    def close(self) -> None:
        """Release all documents, also those with open questions."""
        for document in list(self._held):
            document.open, document.more = 0, False
            self._release_if_unused(document)

    def _release_if_unused(self, document: RowDocument) -> None:
        if not document.open and not document.more and document in self._held:
            self._held.discard(document)
            self._session.store.end(document.number)


def shared_prefix(content: Content, spec: BatchSpec, tokenizer: Tokenizer, window: float) -> list[int]:
    """The common prefix of the prompts of all questions; empty if they are too long for the model's window."""
    try:
        if not str(content.values[spec.text_column] or "").strip():
            return []
        one, other = (prompt_ids(spec.render(content.values, question), tokenizer) for question in spec.questions[:2])
    except Exception:  # each question will raise the error
        return []
    fits = max(len(one), len(other)) + spec.sampling.max_new_tokens <= window
    return one[: common_length(one, other)] if fits else []
