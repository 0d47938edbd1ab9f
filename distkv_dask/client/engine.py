"""The engine: the user's handle to a model on a Dask cluster, for prompts longer than any worker's KV memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from distributed import Client

from distkv_dask.client.documents.document import Document
from distkv_dask.client.documents.library import Library
from distkv_dask.client.documents.readers import Reader
from distkv_dask.client.embedding import Embedding
from distkv_dask.client.handle import Handle
from distkv_dask.client.notebook import engine_html
from distkv_dask.client.session.attached_engine import AttachedEngine
from distkv_dask.client.session.generate import several, submit_all, wait_for_all
from distkv_dask.client.session.generation import Generation, TextPieces
from distkv_dask.client.session.owned_engine import OwnedEngine
from distkv_dask.client.session.session import Session
from distkv_dask.config import Config
from distkv_dask.sampling import Prompt, SamplingParams


class Engine(Handle, Embedding):
    """A model served by all workers of a Dask cluster, whose KV caches form one pool.

    Parameters
    ----------
    client
        Dask client; None takes the current one. With an asynchronous client, ``await`` the engine or use
        ``async with``, and await ``generate``, ``status`` and ``close``.
    model
        A Hugging Face directory or hub name, a GGUF file, or ``"smollm2-135m"``; every worker must be able to read it.
    dtype
        Dtype of weights and KV cache: ``"auto"`` (the checkpoint's), ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    kv_memory
        KV memory of each worker: bytes, or text such as ``"64 MiB"``. None means half of what the weights leave of the
        worker's memory limit.
    rope_scaling
        Allows sequences longer than the model was trained for: ``{"rope_type": "yarn", "factor": 4.0}`` (or
        ``"linear"``) multiplies its window by four. Answers lose some quality, more with models not trained for it.
    **settings
        Any field of :class:`~distkv_dask.config.Config`.

    Raises
    ------
    ConfigError, ModelError, UnsupportedModelError, CapacityError, ClusterError
        When the engine cannot be opened; the message says what to change.

    Examples
    --------
    >>> with Engine(client, model="smollm2-135m", kv_memory="64 MiB") as engine:  # doctest: +SKIP
    ...     done = engine.generate(["What is gravity?"], SamplingParams(max_new_tokens=64))
    ...     print(done[0].text)
    """

    def __init__(
        self,
        client: Client | None = None,
        model: str = "smollm2-135m",
        *,
        dtype: str = "auto",
        kv_memory: int | str | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        engine = OwnedEngine.of(model, dtype, rope_scaling, kv_memory=kv_memory, **settings)
        self._start(Session(client, engine))

    @classmethod
    def attach(cls, engine: str | None = None, client: Client | None = None) -> Self:
        r"""Use an engine that is already open, from a task, another notebook or another program.

        Nothing is loaded. The handle has its own requests and documents. Closing it ends those requests and releases
        those documents, but leaves the engine open. When the engine's owner closes the engine, the handle ends, too.
        Handles cannot be sent to tasks: send ``engine.id``, and attach there.

        Parameters
        ----------
        engine
            The engine's ``id``; None if the cluster has only one.
        client
            Dask client. None takes the current one; in a task, that of its worker. With an asynchronous client,
            ``await`` the engine or use ``async with``.

        Raises
        ------
        ClusterError
            When no engine is open, when several are open and ``engine`` does not say which, or when the calling task
            holds its worker's thread.
        EngineClosedError
            When the engine with this id no longer exists.

        Examples
        --------
        >>> def title(text, engine_id):  # doctest: +SKIP
        ...     distributed.secede()  # the engine needs the worker's threads while this waits
        ...     with Engine.attach(engine_id) as engine:
        ...         return engine.generate([f"{text}\n\nA title:"])[0].text
        >>> client.submit(title, text, engine.id)  # doctest: +SKIP
        """
        self = cls.__new__(cls)
        self._start(Session(client, AttachedEngine(engine or "")))
        return self

    def _start(self, session: Session) -> None:
        self._session = session
        self._library = Library(session)

    # Requests

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Any:
        """Answer prompts, decoding them together; returns a list of :class:`Completion` in their order.

        Parameters
        ----------
        prompts
            Texts, lists of token ids, or lists of chat messages; a single text counts as a list of one.
        sampling
            One for all prompts or one for each; None means ``SamplingParams()``.

        Returns
        -------
        list[Completion]
            A request that fails, or cannot be submitted, does not stop the others: its ``finish_reason`` is
            ``"error"`` and ``error`` says why.

        Raises
        ------
        InvalidRequestError
            When ``prompts`` is not a list of prompts, or ``sampling`` has another length.
        EngineClosedError
            When the engine is closed. Requests that were already submitted are cancelled.
        """
        self._session.check_open()
        return self.client.sync(wait_for_all, submit_all(several(prompts), sampling, self._session.submit))

    def submit(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Generation:
        """Ask for a completion and return at once.

        Returns
        -------
        Generation
            A future, which can also be awaited. ``result()`` returns the :class:`Completion` or raises the error;
            ``cancel()`` stops the request.

        Raises
        ------
        InvalidRequestError
            When the prompt is invalid or too long.
        EngineClosedError
            When the engine is closed.
        """
        return self._session.submit(prompt, sampling)

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> TextPieces:
        """Ask for a completion and iterate (``for`` or ``async for``) over its text as it is generated."""
        pieces = TextPieces.of(sampling)
        return pieces.follow(self._session.submit(prompt, sampling, pieces.put))

    def in_span(self, *tags: str) -> AbstractContextManager[None]:
        """Put the engine's Dask tasks into their own span (``distributed.span``) while the context lasts.

        Tasks serve many requests at once, so requests that run at the same time are in the span, too.
        """
        return self._session.in_span(*tags)

    # Documents

    def ingest(
        self,
        source: Prompt | Path,
        name: str | None = None,
        reader: Reader = "auto",
        adapter: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Compute the KV cache of a document once for many questions; returns when the KV is stored.

        Parameters
        ----------
        source
            A text, a :class:`~pathlib.Path` of a file (.txt, .md, .html, .pdf, .docx, .pptx, .epub), a list of token
            ids, or a list of chat messages. A question follows a text after an empty line. If the model has a chat
            template, both are in the same chat message.
        name
            The document's key in :meth:`documents`; None picks ``"document-0"`` and so on.
        reader
            What reads a file: ``"pypdf"``, ``"docling"`` (layout and tables), or ``"auto"``, as for :meth:`process`.
        adapter
            Path of the LoRA adapter that it is computed with, and all questions on it
            (:attr:`SamplingParams.adapter`).

        Returns
        -------
        Document
            Its KV stays until the document is released or the engine closed. If memory is short, the KV goes to disk
            and is read back for the next question (``distkv.spill``).

        Raises
        ------
        InvalidRequestError, SourceError, MissingProgramError
            When the document is invalid or too long, or its file cannot be read.
        CapacityError
            When the document is larger than the memory of all workers.
        """
        self._session.check_open()
        return self.client.sync(self._library.ingest, source, name, reader, adapter)

    def load(self, place: str | Path, name: str | None = None, adapter: str | os.PathLike[str] | None = None) -> Any:
        """Load a document that :meth:`Document.save` saved, on any set of workers; nothing is computed.

        Parameters
        ----------
        place
            The folder, as a path or URI; all workers must reach it.
        name
            The document's key in :meth:`documents`; None takes the name with which it was saved.
        adapter
            Path of the adapter that it was computed with, if that has moved.

        Returns
        -------
        Document
            As returned by :meth:`ingest`.

        Raises
        ------
        SavedDocumentError
            When the folder has no complete document, when the document needs another model, adapter, dtype or block
            size, or when a file is damaged.
        CapacityError
            When the document is larger than the memory of all workers.
        """
        self._session.check_open()
        return self.client.sync(self._library.load, place, name, adapter)

    def documents(self) -> dict[str, Document]:
        """The documents that have not been released, by name."""
        self._session.check_open()
        return self._library.documents

    # Status

    def status(self) -> Any:
        """A snapshot of the engine: workers, sequences, debts, totals.

        Returns
        -------
        EngineStatus
            For example ``engine.status().workers[address].used_blocks``. Its ``as_dict()`` can be written as JSON.
        """
        self._session.check_open()
        return self.client.sync(self._session.status)

    def graph(self, prompt: Prompt, sampling: SamplingParams | None = None, granularity: str | None = None) -> Any:
        """Build the Dask graph of one decode step of a prompt, placed as it would be now; nothing is computed.

        Parameters
        ----------
        prompt, sampling
            As for :meth:`submit`; the most tokens that the request can have decides the placement.
        granularity
            ``"window"`` or ``"layer"``; None takes the engine's setting.

        Returns
        -------
        StepGraph
            Its ``tasks`` and the ``workers`` they are pinned to; ``visualize("step.svg")`` draws it.

        Raises
        ------
        InvalidRequestError, CapacityError, ConfigError
            When the prompt cannot be served, there is no room for it now, or the granularity is unknown.
        """
        self._session.check_open()
        chosen = Config.load(granularity=granularity or self.config.granularity).granularity
        tokens = len(self.tokenizer.encode(prompt)) + (sampling or SamplingParams()).max_new_tokens - 1
        return self.client.sync(self._session.graph, tokens, chosen)

    def _repr_html_(self) -> str:
        return engine_html(self._session, self._library.documents)
