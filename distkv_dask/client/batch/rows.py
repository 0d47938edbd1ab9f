"""A row of a batch's source: its label, the columns that are kept, and its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from distkv_dask.client.documents.readers import Reader
from distkv_dask.sampling import Prompt

if TYPE_CHECKING:
    import pyarrow as pa


class Texts(NamedTuple):
    """Texts of one request for embeddings, which are written as base64 or as numbers."""

    prompts: tuple[Prompt, ...]
    base64: bool


@dataclass(frozen=True, slots=True)
class Content:
    """The parts of a prompt.

    Parameters
    ----------
    values
        Fields for the template, by name.
    prompt
        A whole prompt, if the source has prompts (OpenAI batch files), or several texts to embed; then no template is
        used.
    sampling
        The row's own sampling parameters, by the names of :class:`~distkv_dask.sampling.SamplingParams`; the batch's
        sampling supplies the others.
    template
        Variables for the model's chat template, if the prompt is chat messages.
    """

    values: Mapping[str, Any]
    prompt: Prompt | Texts | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class File:
    """A file whose text another process may extract.

    Parameters
    ----------
    suffix
        The ending of its name, in lower case.
    data
        Its bytes.
    reader
        What reads it.
    content
        Makes the row's content of its text.
    """

    suffix: str
    data: bytes
    reader: Reader
    content: Callable[[str], Content]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Parameters
    ----------
    label
        The permanent name of the row in its source: its number, or its file's path.
    fingerprint
        Hash of all that its answers depend on.
    kept
        The columns that go to the output: one row.
    read
        Gives the content, or raises :class:`~distkv_dask.errors.InvalidRequestError` when the row cannot be used.
    file
        The file whose text :attr:`read` extracts here, if that takes long enough to be done by a worker.
    """

    label: int | str
    fingerprint: str
    kept: pa.RecordBatch
    read: Callable[[], Content]
    file: File | None = None


class Source(Protocol):
    """Rows in a fixed order, read on demand."""

    @property
    def label(self) -> str:
        """Name of the column of labels in the output: ``"row"`` or ``"path"``."""

    @property
    def kept(self) -> pa.Schema:
        """The columns that go to the output."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names that a template may use."""

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Every row, from number ``start`` on."""

    def count(self) -> int | None:
        """Number of rows, or None if it is not known before all are read."""


def fingerprint(*parts: bytes | str) -> str:
    """Return a hash of ``parts`` as 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
