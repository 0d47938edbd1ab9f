"""The documents of one session by name: ingested and loaded."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path

from distkv_dask.adapter import Adapter
from distkv_dask.client.documents.document import Document
from distkv_dask.client.documents.prompts import DocumentText, read_text
from distkv_dask.client.documents.readers import Reader
from distkv_dask.client.documents.saved_document import read_metadata
from distkv_dask.client.session.session import Session
from distkv_dask.client.session.store import ended
from distkv_dask.errors import InvalidRequestError, SavedDocumentError
from distkv_dask.messages.names import Saved
from distkv_dask.sampling import Prompt
from distkv_dask.texts import checked_name
from distkv_dask.watch import watched


class Library:
    """Documents by name; used on the session's event loop, except for :attr:`documents`.

    Parameters
    ----------
    session
        The session that submits them.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._documents: dict[str, Document] = {}
        self._unnamed = itertools.count()

    @property
    def documents(self) -> dict[str, Document]:
        """Those that have not been released."""
        self._documents = {name: one for name, one in self._documents.items() if not one.is_released}
        return dict(self._documents)

    async def ingest(
        self, source: Prompt | Path, name: str | None, reader: Reader, adapter: str | os.PathLike[str] | None = None
    ) -> Document:
        """See :meth:`distkv_dask.Engine.ingest`."""
        name = self._name(name)
        with_adapter = await asyncio.to_thread(self._session.adapter, adapter)
        known = await asyncio.to_thread(read_text, source, reader) if isinstance(source, Path) else source
        text = await asyncio.to_thread(DocumentText.of, known, self._session.tokenizer)
        window = self._session.facts.max_positions
        if len(text.ids) >= window:
            raise InvalidRequestError(
                f"a document of {len(text.ids)} tokens leaves no room for a question in the model's window of {window} "
                "tokens: shorten it"
            )
        return await self._hand_in(name, text, None, with_adapter)

    async def load(
        self, place: str | Path, name: str | None, adapter: str | os.PathLike[str] | None = None
    ) -> Document:
        """See :meth:`distkv_dask.Engine.load`."""
        session = self._session
        limit = session.config.timeout_files
        where, saved = await watched(limit, f"reading the document in {place}", read_metadata, place)
        name = self._name(saved.name if name is None else name)
        saved.check(where, session.facts, session.config.block_tokens)
        with_adapter = await asyncio.to_thread(session.adapter, adapter or saved.adapter_path or None)
        saved.check_adapter(where, with_adapter)
        text = await asyncio.to_thread(DocumentText.of, saved.source, session.tokenizer)
        if tuple(text.ids) != saved.ids:
            raise SavedDocumentError(
                f"the document in {place} has other tokens with this engine's tokenizer or chat template: ingest it "
                "again"
            )
        return await self._hand_in(name, text, Saved(where, saved.files), with_adapter)

    def _name(self, given: str | None) -> str:
        if given is not None:
            return checked_name(given, "the document's name")
        free = (f"document-{at}" for at in self._unnamed)
        return next(one for one in free if one not in self.documents)

    async def _hand_in(self, name: str, text: DocumentText, saved: Saved | None, adapter: Adapter | None) -> Document:
        if name in self.documents:
            raise InvalidRequestError(f"a document named {name!r} exists already: release it, or choose another name")
        operation = self._session.store.begin_ingest(text.ids, name, saved, adapter)
        self._documents[name] = document = Document(self._session, name, operation.number, text, adapter)
        try:
            stored = await ended(operation)
        except BaseException:
            self._documents.pop(name, None)
            raise
        document.placement = stored.placement
        return document
