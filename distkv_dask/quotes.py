r"""Answers that are spans of a document, word for word: the grammar that makes them so, and where they are.

The grammar is llguidance's ``%regex`` of substrings, which follows a suffix automaton of the document's words
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from distkv_dask.errors import InvalidRequestError

QuoteForm = Literal["answer", "evidence"]
"""Whether the whole answer is a quote, or a free answer is followed by one."""

PAGE_END = "\f"
"""The end of a page of a text, as ``pdftotext`` writes it."""

_BEFORE = '\nQuote: "'
_LONGEST_WORD = 16
"""Characters of a word, on average, above which a text has no words between spaces: Chinese, for example."""


@dataclass(frozen=True, slots=True)
class Quote:
    """A span of a document.

    ``text`` is ``document[start:stop]``, in characters. ``page`` counts from 1, and is None where the document's text
    has no pages. If a text occurs several times in the document, this is the first occurrence.
    """

    text: str
    start: int
    stop: int
    page: int | None = None


def quote_grammar(document: str, form: QuoteForm) -> str:
    """The grammar of answers that quote a document, for ``SamplingParams(grammar=...)``.

    Quotes hold at least one letter or digit, and begin and end between words, where the document has words.

    Raises
    ------
    InvalidRequestError
        When there is nothing to quote.
    """
    words = len(re.findall(r"\w+", document))
    if not words:
        raise InvalidRequestError("the document has no words, and so nothing to quote")
    unit = "substring_words" if len(re.findall(r"\w", document)) <= _LONGEST_WORD * words else "substring_chars"
    quote = f"QUOTE: %regex {json.dumps({unit: document})} & /(?s:.*\\w.*)/\n"
    if form == "answer":
        return f"start: QUOTE\n{quote}"
    return f'start: ANSWER {json.dumps(_BEFORE)} QUOTE "\\""\nANSWER: /[^\\n]+/\n{quote}'


@dataclass(frozen=True, slots=True)
class Quoting:
    """Reads answers that quote a document."""

    document: str
    form: QuoteForm | bool

    def find(self, said: str) -> Quote | None:
        """Find the quote of an answer in the document; None if the answer was cut before it."""
        if self.form == "evidence":
            said = said.partition(_BEFORE)[2].removesuffix('"')
        text = said.rstrip("\N{REPLACEMENT CHARACTER}").strip()  # the last character may have been cut
        start = self.document.find(text)
        if not text or start < 0:
            return None
        page = 1 + self.document.count(PAGE_END, 0, start) if PAGE_END in self.document else None
        return Quote(text, start, start + len(text), page)


def free_answer(said: str) -> str:
    """The answer before its quote, with evidence."""
    return said.partition(_BEFORE)[0]
