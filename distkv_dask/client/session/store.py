"""Documents as the cluster keeps them, by number: computed, saved and given back."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence

from distkv_dask.client.session.conversation import Conversation
from distkv_dask.client.session.operation import Operation
from distkv_dask.errors import WorkerLostError
from distkv_dask.messages.client_calls import Delivery, Submission
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

    def begin_ingest(self, ids: Sequence[int], name: str = "", saved: Saved | None = None) -> Operation:
        """Hand in the tokens that prompts begin with, from any thread, and return at once.

        Parameters
        ----------
        ids
            Token ids.
        name
            The document's, for people.
        saved
            Where its blocks lie; None has them computed.

        Returns
        -------
        Operation
            A future of the delivery that says where its KV lies; ``number`` is the document's.
        """
        number = self._conversation.number()
        return self._submit(Submission(number, array("i", ids), None, saved=saved, name=name))

    async def save(self, document: int, saved: Saved) -> Delivery:
        """Have a document's blocks written; the delivery names the files.

        Once more, where a worker that was writing died: the document is whole again when its turn comes.
        """
        for attempt in range(SAVE_TRIES):
            number, tag = self._conversation.number(), f"{saved.tag}{attempt or ''}"
            place = saved._replace(tag=tag)
            try:
                return await ended(self._submit(Submission(number, array("i"), None, document=document, saved=place)))
            except WorkerLostError:
                if attempt == SAVE_TRIES - 1:
                    raise
        raise AssertionError("not reached")

    async def release_documents(self, *documents: int) -> None:
        """Need documents no more, after the questions that are on their way to them."""
        await self._conversation.flushed()
        for document in documents:
            await self._conversation.give_up(document)

    def end(self, document: int) -> None:
        """Need a document no more, after the questions that are on their way to it; from any thread."""
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
