"""Documents on the cluster, by number: computed, saved and released."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence

from distkv_dask.adapter import Adapter
from distkv_dask.client.session.conversation import Conversation
from distkv_dask.client.session.operation import Operation
from distkv_dask.errors import WorkerLostError
from distkv_dask.messages.client_calls import Delivery, Ingest, Load, Save, Submission
from distkv_dask.messages.names import Saved

SAVE_TRIES = 3
"""Attempts to save a document while workers die."""


class DocumentStore:
    """Documents of one session.

    Parameters
    ----------
    conversation
        The session's.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def begin_ingest(
        self, ids: Sequence[int], name: str = "", saved: Saved | None = None, adapter: Adapter | None = None
    ) -> Operation:
        """Submit a document's tokens, from any thread, and return at once.

        Parameters
        ----------
        ids
            Token ids.
        name
            The document's, for display.
        saved
            Where its blocks are saved; None computes them.
        adapter
            What it is computed with, and all questions on it.

        Returns
        -------
        Operation
            A future of the delivery with the placement of its KV; ``number`` is the document's.
        """
        number = self._conversation.number()
        tokens = array("i", ids)
        if saved is not None:
            return self._submit(Load(number, tokens, saved, name, adapter))
        return self._submit(Ingest(number, tokens, name, adapter))

    async def save(self, document: int, saved: Saved) -> Delivery:
        """Write a document's blocks; the delivery names the files.

        If a worker dies while it writes, the save is repeated: the document is complete again when its turn comes.
        """
        for attempt in range(SAVE_TRIES):
            number, tag = self._conversation.number(), f"{saved.tag}{attempt or ''}"
            place = saved._replace(tag=tag)
            try:
                return await ended(self._submit(Save(number, document, place)))
            except WorkerLostError:
                if attempt == SAVE_TRIES - 1:
                    raise
        raise AssertionError("not reached")

    async def release_documents(self, *documents: int) -> None:
        """Release documents, after the questions on them that are being sent."""
        await self._conversation.flushed()
        for document in documents:
            await self._conversation.give_up(document)

    def end(self, document: int) -> None:
        """Release a document, after the questions on it that are being sent; from any thread."""
        self._conversation.release_document(document)

    def _submit(self, submission: Submission) -> Operation:
        operation = Operation(submission, self._conversation.cancel)
        self._conversation.submit(operation)
        return operation


async def ended(operation: Operation) -> Delivery:
    """Wait for an operation; if the waiting task is cancelled, so is the operation."""
    try:
        return await operation
    except asyncio.CancelledError:
        operation.cancel()
        raise
