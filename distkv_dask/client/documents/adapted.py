"""Questions on a document are computed with the document's adapter: its KV cannot be used with another."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from distkv_dask.adapter import Adapter
from distkv_dask.client.session.session import Session
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import SamplingParams


class Adapted(Protocol):
    """Something with a name that was computed with an adapter, or with none."""

    name: str
    adapter: Adapter | None


def with_adapter(sampling: SamplingParams | None, document: Adapted, session: Session) -> SamplingParams | None:
    """Sampling parameters of a question, with the adapter of its document.

    Parameters
    ----------
    sampling
        As the user gave them.
    document
        The document.
    session
        Reads the adapter that ``sampling`` names, if it names one.

    Raises
    ------
    AdapterError, InvalidRequestError
        When they name an adapter that cannot be read, or another one.
    """
    own = None if document.adapter is None else document.adapter.path
    asked = sampling.adapter if isinstance(sampling, SamplingParams) else None
    if asked is None:
        adapts = own is not None and isinstance(sampling, SamplingParams | None)  # other types are refused later
        return replace(sampling or SamplingParams(), adapter=own) if adapts else sampling
    if session.adapter(asked) != document.adapter:
        with_what = "without an adapter" if own is None else f"with the adapter in {own}"
        raise InvalidRequestError(
            f"document {document.name!r} was computed {with_what}, but the question asks for the adapter in {asked}: "
            f"ingest the document again with adapter={str(asked)!r}"
        )
    return sampling
