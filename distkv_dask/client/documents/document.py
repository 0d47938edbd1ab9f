"""Documents for users: ingested once, asked often, and finally released."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from distkv_dask.adapter import Adapter
from distkv_dask.client.documents.adapted import with_adapter
from distkv_dask.client.documents.chat import Chat
from distkv_dask.client.documents.kept import Kept
from distkv_dask.client.documents.prompts import DocumentText, Question, Turn, common_length
from distkv_dask.client.documents.save import Save
from distkv_dask.client.documents.saved_document import SavedDocument, plain_source
from distkv_dask.client.notebook import document_html
from distkv_dask.client.session.generate import submit_all, wait_for_all
from distkv_dask.client.session.generation import Generation, Piece, TextPieces
from distkv_dask.client.session.session import Session
from distkv_dask.completion import Completion
from distkv_dask.errors import EngineClosedError, InvalidRequestError, SavedDocumentError
from distkv_dask.messages.names import Saved
from distkv_dask.placement import Placement
from distkv_dask.sampling import SamplingParams
from distkv_dask.watch import watched


class Document(Kept):
    """A text whose KV cache stays on the cluster, shared by all questions on it; made by ``Engine.ingest``.

    It is a context manager (``async with`` for asynchronous clients) that releases the document at the end.

    Attributes
    ----------
    name
        The document's name within the engine.
    number
        The document's number in ``engine.status().sequences``.
    ids
        The token ids with which every prompt on the document begins.
    placement
        Where the KV was when it was stored; it may have been moved since then.
    adapter
        The LoRA adapter that it was computed with, and with which its questions are answered; None without one.
    """

    def __init__(
        self, session: Session, name: str, number: int, text: DocumentText, adapter: Adapter | None = None
    ) -> None:
        self.adapter = adapter
        self.name = name
        self.number = number
        self.ids = text.ids
        self.placement: Placement = ()
        self._session = session
        self._text = text
        self._released = False

    @property
    def tokens(self) -> int:
        """Number of tokens with which every prompt on the document begins."""
        return len(self.ids)

    @property
    def text(self) -> str | None:
        """What it was ingested from, if that was a text or a file: offsets of quotes are in it, in characters."""
        return self._text.source if isinstance(self._text.source, str) else None

    def prompt(self, question: Question, turns: Sequence[Turn] = ()) -> list[int]:
        """Token ids of a question's whole prompt; ``engine.generate`` gives the same answer to them, but prefills all.

        ``turns`` are earlier questions of a chat with their answers (``Chat.turns``).

        Raises
        ------
        InvalidRequestError
            When the question is empty or of another type, or its prompt does not begin with the document.
        """
        ids = self._text.prompts.prompt(question, turns)
        same = common_length(ids, self.ids)
        if same <= len(self.ids) - self._session.config.block_tokens:
            raise InvalidRequestError(
                f"the prompt of this question does not begin with the document: only {same} of its {len(self.ids)} "
                "tokens are the same. The model's chat template puts something before it, or changes it, for this "
                "question; ask it with engine.generate"
            )
        return ids

    def ask(
        self, question: Question | Sequence[Question], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Any:
        """Answer one question, or several together.

        Parameters
        ----------
        question
            A text, or token ids for a document of token ids; or a list of such questions.
        sampling
            One for all questions or one for each; None means ``SamplingParams()``.

        Returns
        -------
        Completion or list of Completion
            One for each question. If one of several questions fails, the others continue: its ``finish_reason`` is
            ``"error"`` and ``error`` says why.

        Raises
        ------
        InvalidRequestError, DistKVError
            When a single question is invalid, or fails.
        EngineClosedError
            When the document was released or its engine closed.
        """
        if _is_one(question):
            if sampling is not None and not isinstance(sampling, SamplingParams):
                raise InvalidRequestError("one question takes one SamplingParams, not a list")
            return self._session.client.sync(_result, self.submit(cast(Question, question), sampling))
        return self._session.client.sync(wait_for_all, submit_all([*question], sampling, self.submit))

    def submit(self, question: Question, sampling: SamplingParams | None = None) -> Generation:
        """Ask a question and return at once, as ``Engine.submit`` does."""
        return self._submit(question, sampling)

    def stream(self, question: Question, sampling: SamplingParams | None = None) -> TextPieces:
        """Ask a question and iterate over its answer's text, as ``Engine.stream`` does."""
        pieces = TextPieces.of(sampling)
        return pieces.follow(self._submit(question, sampling, pieces.put))

    def chat(self) -> Chat:
        """Begin a conversation about the document; the KV of every turn is kept."""
        self.check_open()
        return Chat(self, self._session)

    def release(self) -> Any:
        """Release the document: its KV is freed once its running questions have ended."""
        return self._leave()

    def save(self, place: str | Path) -> Any:
        """Save the KV so that an engine with the same model can load it; returns when everything is written.

        All workers that hold KV write at the same time. An earlier save in the folder is replaced in one step, after
        everything is safe on disk. If several saves to one folder run at once, the last to end remains, complete. Only
        the owner can read the files, because they contain the text.

        Parameters
        ----------
        place
            A folder that all workers reach: a path, or a URI that pyarrow or fsspec knows (``s3://bucket/report``).

        Raises
        ------
        SavedDocumentError
            When the folder cannot be written, or makes no progress for ``distkv.timeouts.files``. The failed save
            leaves nothing behind, and an earlier save is kept.
        """
        self.check_open()
        return self._session.client.sync(self._save, place)

    async def _save(self, place: str | Path) -> None:
        session, facts = self._session, self._session.facts
        plain, limit, what = plain_source(self._text.source), session.config.timeout_files, f"saving in {place}"
        save = await watched(limit, what, Save, place)
        try:
            done = await session.store.save(self.number, Saved(save.place, tag=save.tag))
            saved = SavedDocument(
                self.name, session.model.name, facts.fingerprint, facts.dtype, session.config.block_tokens,
                facts.block_bytes, plain, tuple(self.ids), done.files, *(self.adapter or ()),
            )  # fmt: skip
            await watched(limit, what, save.commit, saved)
        finally:
            with contextlib.suppress(SavedDocumentError):  # the next save there deletes what could not be deleted
                await watched(limit, what, save.end)

    async def _end(self) -> None:
        if not self._released:
            self._released = True
            await self._session.store.release_documents(self.number)

    def check_open(self) -> None:
        """Raise :class:`EngineClosedError` if the document was released or its engine closed."""
        if self._released:
            raise EngineClosedError(f"document {self.name!r} was released: ingest it again")
        self._session.check_open()

    @property
    def is_released(self) -> bool:
        """Whether the document was released."""
        return self._released

    def _repr_html_(self) -> str:
        return document_html(self, self._session)

    def __repr__(self) -> str:
        return f"<Document {self.name!r} of {self.tokens} tokens{', released' if self._released else ''}>"

    def _submit(
        self, question: Question, sampling: SamplingParams | None, on_piece: Callable[[Piece], None] | None = None
    ) -> Generation:
        self.check_open()
        sampling = with_adapter(sampling, self, self._session)
        return self._session.ask_ids(self.prompt(question), sampling, on_piece, self.number, self.text)


async def _result(generation: Generation) -> Completion:
    try:
        return await generation
    except asyncio.CancelledError:
        generation.cancel()
        raise


def _is_one(question: Any) -> bool:
    """Whether this is a single question: a text, or token ids."""
    if isinstance(question, str):
        return True
    if not isinstance(question, Sequence):
        raise InvalidRequestError(f"a question is a text or a list of token ids, not {type(question).__name__}")
    return bool(question) and all(isinstance(one, int) for one in question)
