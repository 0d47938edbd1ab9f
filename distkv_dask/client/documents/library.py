"""The documents of one engine: handed in, loaded, saved and given back."""

from __future__ import annotations

import asyncio
import itertools
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

from distkv_dask.client.documents.document import Document
from distkv_dask.client.documents.prompts import DocumentPrompts, prompts_of, read_text
from distkv_dask.client.documents.saved_document import read_metadata
from distkv_dask.client.session.conversation import Conversation
from distkv_dask.client.session.operation import Operation
from distkv_dask.errors import InvalidRequestError, SavedDocumentError, WorkerLostError
from distkv_dask.protocol import Delivery, Saved, Submission
from distkv_dask.texts import checked_name
from distkv_dask.types import Prompt
from distkv_dask.watch import watched

if TYPE_CHECKING:
    from distkv_dask.client.engine import Engine

SAVE_TRIES = 3
"""How often saving a document is tried, where workers die meanwhile."""


class Library:
    """Documents by name; used on the engine's event loop, but for :attr:`documents`.

    Parameters
    ----------
    engine, conversation
        The engine, and its conversation with the gManager.
    """

    def __init__(self, engine: Engine, conversation: Conversation) -> None:
        self.documents: dict[str, Document] = {}
        self._engine = engine
        self._conversation = conversation
        self._unnamed = itertools.count()

    async def ingest(self, source: Prompt | Path, name: str | None) -> Document:
        """See :meth:`distkv_dask.Engine.ingest`."""
        name = self._name(name)
        known = await asyncio.to_thread(read_text, source) if isinstance(source, Path) else source
        prompts = await asyncio.to_thread(prompts_of, known, self._engine.tokenizer)
        ids = await asyncio.to_thread(prompts.prefix)
        window = self._engine.facts["max_positions"]
        if len(ids) >= window:
            raise InvalidRequestError(
                f"a document of {len(ids)} tokens leaves no room for a question in the model's window of {window} "
                "tokens: shorten it"
            )
        return await self._hand_in(known, name, prompts, ids, None)

    async def load(self, place: str | Path, name: str | None) -> Document:
        """See :meth:`distkv_dask.Engine.load`."""
        limit = self._engine.config.timeout_files
        where, saved = await watched(limit, f"reading the document in {place}", read_metadata, place)
        name = self._name(saved.name if name is None else name)
        saved.check(where, self._engine.facts, self._engine.config.block_tokens)
        prompts = await asyncio.to_thread(prompts_of, saved.source, self._engine.tokenizer)
        ids = await asyncio.to_thread(prompts.prefix)
        if tuple(ids) != saved.ids:
            raise SavedDocumentError(
                f"the document in {place} has other tokens by this engine's tokenizer and chat template: ingest it anew"
            )
        return await self._hand_in(saved.source, name, prompts, ids, Saved(where, saved.files))

    def _name(self, given: str | None) -> str:
        if given is not None:
            return checked_name(given, "the document's name")
        free = (f"document-{at}" for at in self._unnamed)
        return next(one for one in free if one not in self.documents)

    async def _hand_in(
        self, source: Prompt, name: str, prompts: DocumentPrompts, ids: list[int], saved: Saved | None
    ) -> Document:
        number = self._conversation.number()
        if name in self.documents:
            raise InvalidRequestError(f"there is a document {name!r} already: release it, or choose another name")
        self.documents[name] = document = Document(self._engine, name, number, source, prompts, ids)
        try:
            stored = await self._run(Submission(number, array("i", ids), None, saved=saved, name=name))
        except BaseException:
            self.documents.pop(name, None)
            raise
        document.placement = stored.placement
        return document

    async def save(self, document: int, saved: Saved) -> Delivery:
        """Have a document's blocks written; the delivery names the files.

        Once more, where a worker that was writing died: the document is whole again when its turn comes.
        """
        for attempt in range(SAVE_TRIES):
            number, tag = self._conversation.number(), f"{saved.tag}{attempt or ''}"
            try:
                return await self._run(
                    Submission(number, array("i"), None, document=document, saved=saved._replace(tag=tag))
                )
            except WorkerLostError:
                if attempt == SAVE_TRIES - 1:
                    raise
        raise AssertionError("not reached")

    async def _run(self, submission: Submission) -> Delivery:
        operation = Operation(submission, self._conversation.cancel)
        self._conversation.submit(operation)
        try:
            return await operation
        except asyncio.CancelledError:
            operation.cancel()
            raise

    async def release(self, *numbers: int) -> None:
        """Need documents no more, after the questions that are on their way to them."""
        for name in [name for name, one in self.documents.items() if one.number in numbers]:
            del self.documents[name]
        await self._conversation.flushed()
        for number in numbers:
            await self._conversation.give_up(number)

    def begin(self, ids: list[int]) -> int:
        """Hand in tokens that many prompts begin with, from any thread, and return the document's number at once."""
        number = self._conversation.number()
        self._conversation.submit(Operation(Submission(number, array("i", ids), None), self._conversation.cancel))
        return number

    def end(self, number: int) -> None:
        """Need such a document no more, from any thread."""
        self._conversation.release(number)
