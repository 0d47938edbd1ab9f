"""Whatever a model prefers to say, its quotes are in the document, at the given offsets."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")

from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from distkv_dask.errors import InvalidRequestError
from distkv_dask.models.grammars import grammar_of
from distkv_dask.models.source import resolve_model
from distkv_dask.quotes import PAGE_END, QuoteForm, Quoting, free_answer
from distkv_dask.sampling import Form, SamplingParams
from tests._models import VOCAB, text_model_dir

END = VOCAB - 1
TOKENIZER = resolve_model(str(text_model_dir(end=True))).tokenizer()
NEWLINE = TOKENIZER.encode("\n")[0]
BYTES = from_tokenizer(TOKENIZER, n_vocab=VOCAB, eos_token=END)

words = st.text("abé9", min_size=1, max_size=5) | st.sampled_from(["\u4f60\u597d", "don't", "3.5", "<b>"])
gaps = st.sampled_from([" ", "  ", "\n", "\n\n", ", ", '"', '\nQuote: "', "\\", PAGE_END])
documents = st.lists(words | gaps, min_size=1, max_size=40).map("".join)


def say(document: str, form: QuoteForm, seed: int, most: int) -> str:
    """The answer of a model with random preferences, limited in tokens."""
    grammar = SamplingParams(quotes=form).quoting(document).form
    assert grammar is not None
    matcher, preferences = LLMatcher(BYTES, grammar_of(grammar), log_level=0), random.Random(seed)
    assert not matcher.is_error(), matcher.get_error()
    said = list[int]()
    while len(said) < most:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [*map(int, np.flatnonzero(bits[:VOCAB]))]
        token = END if END in allowed and preferences.random() < 0.2 else preferences.choice(allowed)
        if token == END:
            break
        if NEWLINE in allowed and preferences.random() < 0.3:
            token = NEWLINE
        assert matcher.consume_token(token)
        said.append(token)
    text: str = TOKENIZER.decode(said)
    return text


@settings(max_examples=60, deadline=None)
@given(
    documents.map("".join), st.sampled_from(["answer", "evidence"]), st.integers(0, 2**32), st.sampled_from([5, 400])
)
def test_a_quote_is_in_the_document_at_its_offsets(document: str, form: QuoteForm, seed: int, most: int) -> None:
    if not any(letter.isalnum() for letter in document):
        with pytest.raises(InvalidRequestError, match="nothing to quote"):
            say(document, form, seed, most)
        return
    said = say(document, form, seed, most)
    quote = Quoting(document, form).find(said)
    if quote is None:
        assert most == 5, "nothing was cut"
        return
    assert document[quote.start : quote.stop] == quote.text == quote.text.strip() != ""
    assert quote.text in said
    pages = document.split(PAGE_END)
    assert quote.page == (None if len(pages) == 1 else len(document[: quote.start].split(PAGE_END)))
    if most == 400:
        assert any(letter.isalnum() for letter in quote.text)
        assert said.endswith(quote.text) or form == "evidence" or said.rstrip().endswith(quote.text)
    if form == "evidence":
        assert "\n" not in free_answer(said)


def test_quotes_begin_and_end_between_words_where_there_are_words() -> None:
    document = "profits rose in spring, and fell in autumn"
    found = {Quoting(document, "answer").find(say(document, "answer", seed, 400)) for seed in range(40)}
    texts = {one.text for one in found if one is not None}
    assert len(texts) > 10
    assert {word for text in texts for word in text.replace(",", "").split()} <= set(document.replace(",", "").split())


def test_a_text_without_spaces_is_quoted_by_characters() -> None:
    document = "\u6c38" * 3 + "\u548c" * 30
    assert len({say(document, "answer", seed, 400) for seed in range(20)}) > 3


@pytest.mark.parametrize("document", ["", " \n", "...\f"])
def test_a_document_without_words_is_refused(document: str) -> None:
    with pytest.raises(InvalidRequestError, match="nothing to quote"):
        SamplingParams(quotes=True).quoting(document)


def test_quotes_are_a_grammar_only_where_there_is_a_document() -> None:
    sampling = SamplingParams(quotes=True, temperature=0.5)
    assert sampling.quotes == "answer"
    assert SamplingParams(quotes=False) == SamplingParams()
    resolved = sampling.quoting("some words")
    assert (resolved.quotes, resolved.temperature) == (None, 0.5)
    assert isinstance(resolved.form, Form)
    assert json.dumps("some words") in resolved.form.text
    assert SamplingParams().quoting(None) == SamplingParams()
    with pytest.raises(InvalidRequestError, match="of a document"):
        sampling.quoting(None)
    for wrong in ("text", 1, 2, ["answer"], ""):
        with pytest.raises(InvalidRequestError, match="quotes is"):
            SamplingParams(quotes=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="leave out"):
        SamplingParams(quotes=True, regex="a")
