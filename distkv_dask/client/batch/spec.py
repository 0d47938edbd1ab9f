"""The settings of a batch, checked once; and how a row and a question become a prompt."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from distkv_dask.client.documents.readers import Reader, checked_reader
from distkv_dask.errors import InvalidRequestError
from distkv_dask.models.adapter_files import read_adapter
from distkv_dask.models.grammars import check_installed, grammar_of
from distkv_dask.sampling import SamplingParams
from distkv_dask.texts import checked_text

if TYPE_CHECKING:
    from distkv_dask.client.batch.rows import Content

TooLong = Literal["refuse", "truncate-head", "truncate-middle", "truncate-tail", "map-reduce"]
"""How to handle a prompt longer than the model's window; "truncate-head" drops the document's beginning."""

TEXT = "text"
"""The default column of the text."""

OVERLAP = 64
"""Tokens that neighbouring parts of map-reduce share."""

COMBINE = (
    "Each of these answers is about another part of one document, in order:\n\n{answers}\n\n"
    "Answer for the whole document: {question}"
)
"""The combining question of map-reduce."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    """Questions, templates and sampling of a batch; :func:`distkv_dask.client.batch.process` describes them.

    Raises
    ------
    InvalidRequestError
        When they contradict each other; the message says what to change.
    """

    questions: tuple[str | None, ...] = (None,)
    template: str | None = None
    text_column: str = TEXT
    sampling: SamplingParams = field(default_factory=SamplingParams)
    too_long: TooLong = "refuse"
    overlap: int = OVERLAP
    combine: str = COMBINE
    reader: Reader = "auto"
    adapter_column: str | None = None

    def __post_init__(self) -> None:
        """Check what does not depend on the source: errors here affect every row."""
        if not self.questions or not all(one is None or (isinstance(one, str) and one) for one in self.questions):
            raise InvalidRequestError(f"questions should be texts that are not empty: {self.questions!r:.200}")
        if len(set(self.questions)) < len(self.questions):
            raise InvalidRequestError(f"a question is asked twice: {self.questions!r:.200}")
        if self.too_long not in get_args(TooLong):
            raise InvalidRequestError(
                f"too_long is {self.too_long!r}, but must be one of {', '.join(get_args(TooLong))}"
            )
        for name, usual in (("overlap", OVERLAP), ("combine", COMBINE)):
            if self.too_long != "map-reduce" and getattr(self, name) != usual:
                raise InvalidRequestError(f'{name} is for too_long="map-reduce": leave out {name}, or choose that')
        checked_reader(self.reader)
        if self.sampling.adapter is not None:
            read_adapter(self.sampling.adapter)
        if self.overlap < 0:
            raise InvalidRequestError(f"overlap is {self.overlap}, but must be at least 0 tokens")
        asks = self.questions != (None,)
        if self.too_long == "map-reduce" and not asks:
            raise InvalidRequestError('too_long="map-reduce" needs a question, which is asked of each part')
        if not {"answers"} <= set(_fields(self.combine)) <= {"answers", "question"}:
            raise InvalidRequestError("combine may use {answers} and {question}, and needs the first")
        if asks and self.sampling.embed is not None:
            raise InvalidRequestError("an embedding is of a text: put further words into the template")
        fields = _fields(self.full_template)
        if "text" not in fields and self.text_column not in fields:
            raise InvalidRequestError("the template needs {text}, which stands for the row's text")
        if asks != ("question" in fields):
            what = "use {question} in the template" if asks else "give a question for the template's {question}"
            raise InvalidRequestError(what)
        for text in (*self.questions, self.full_template, self.text_column, self.combine):
            checked_text(text or "", "a question or template")
        _check_formats(self.full_template, ("text", "question", self.text_column))
        _check_formats(self.combine, ("answers", "question"))
        if self.sampling.quotes is not None:
            check_installed("quotes of documents")
        if (form := self.sampling.form) is not None:
            grammar_of(form)
            checked_text(form.text, form.name)
            if form.kind == "schema":
                _check_schema(form.text)

    @property
    def full_template(self) -> str:
        """The template, the default one if none was given."""
        if self.template is not None:
            return self.template
        return "{text}" if self.questions == (None,) else "{text}\n\n{question}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The source's columns that prompts use."""
        names = [name for name in _fields(self.full_template) if name not in ("text", "question")]
        adapters = () if self.adapter_column is None else (self.adapter_column,)
        return tuple(dict.fromkeys((self.text_column, *names, *adapters)))

    def sampling_for(self, content: Content) -> SamplingParams:
        """How answers about a row are drawn, with which adapter.

        Raises
        ------
        AdapterError, InvalidRequestError
            When the row's own parameters are not valid, or its adapter cannot be computed.
        """
        said = dict(content.sampling)
        if self.adapter_column is not None and (place := content.values[self.adapter_column]) is not None:
            said["adapter"] = place
        sampling = self.sampling.updated(said) if said else self.sampling
        if "adapter" in said and sampling.adapter is not None:
            read_adapter(sampling.adapter)
        return sampling

    def uses(self, name: str) -> bool:
        """Whether the template has a field of a name."""
        return name in _fields(self.full_template)

    def parameters(self) -> dict[str, Any]:
        """Everything that answers depend on, as JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.sampling.n == 1:  # so that outputs begun by versions without a number, or a reader, can be continued
            del plain["sampling"]["n"]
        if self.reader == "auto":
            del plain["reader"]
        if self.adapter_column is None:
            del plain["adapter_column"]
        if (adapter := plain["sampling"].pop("adapter")) is not None:
            plain["sampling"]["adapter"] = list(read_adapter(adapter))
        return plain

    def render(self, values: Mapping[str, Any], question: str | None) -> str:
        """The text of a prompt.

        Raises
        ------
        InvalidRequestError
            When a value does not fit the template's format for it.
        """
        known = {name: "" if value is None else value for name, value in values.items()}
        return _filled(self.full_template, known | {"text": known[self.text_column], "question": question})

    def combined(self, answers: str, question: str | None) -> str:
        """The text of a prompt that combines answers about parts."""
        return _filled(self.combine, {"answers": answers, "question": question})


class _Names(string.Formatter):
    """A formatter with fields by name only, also for digits: columns of pandas frames may have such names."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[str(key)]


def _check_schema(schema: str) -> None:
    """Refuse a schema that gives no columns."""
    read = json.loads(schema)
    checked_text(json.dumps(read, ensure_ascii=False), "the JSON schema")
    kind = read.get("type", "object")
    if read.get("properties") and "object" not in (kind if isinstance(kind, list) else [kind]):
        raise InvalidRequestError(f"the JSON schema has properties, but its type is {kind!r:.100}, not 'object'")


def _filled(template: str, values: Mapping[str, Any]) -> str:
    parsed = string.Formatter().parse(template)
    return "".join(text + ("" if name is None else _field(name, how, as_, values)) for text, name, how, as_ in parsed)


def _check_formats(template: str, texts: Sequence[str]) -> None:
    """Refuse formats that can never be filled in; for columns of any type, only the conversion is known."""
    for _, name, how, as_ in string.Formatter().parse(template):
        if name is not None:
            _field(name, how if name in texts else "", as_, {name: "x"})


def _field(name: str, how: str | None, as_: str | None, values: Mapping[str, Any]) -> str:
    field = f"{{{name}{f'!{as_}' if as_ else ''}{f':{how}' if how else ''}}}"
    try:
        return _Names().vformat(field, (), values)
    except Exception as error:  # whatever the value's class
        raise InvalidRequestError(f"the template's {field} cannot be filled in: {error}") from error


def _fields(template: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InvalidRequestError(f"the template cannot be read: {error}. Write {{{{ for a brace.") from error
    for name in names:
        if not name or not set(name).isdisjoint(".["):
            raise InvalidRequestError(f"the template uses {{{name}}}: only column names may be in braces")
    if any("{" in (how or "") for _, _, how, _ in string.Formatter().parse(template)):
        raise InvalidRequestError("the template has braces within braces: formats may not depend on other columns")
    return names
