"""Answers that quote a document: the tokens of one process with the same grammar, wherever the KV is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from distributed import Client, Scheduler, Worker

pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")

from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from distkv_dask import Engine, InvalidRequestError, Quote, SamplingParams
from distkv_dask.quotes import QuoteForm, Quoting, quote_grammar
from tests._cluster import engine_test
from tests._models import VOCAB, text_model_dir
from tests._pdf import save_pdf

END = VOCAB - 1
TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "512 KiB", "block_tokens": 8, "prefill_chunk_tokens": 32}
PAGES = ["Profits rose in spring. The board was pleased.", "Costs fell, and nobody knows why."]
TEXT = "".join(f"{page}\n\f" for page in PAGES) + "Thus ends the report of the year, which few will read. " * 2
MOST = 60


def reference(prompt: list[int], form: QuoteForm) -> list[int]:
    """Greedy tokens of one process, with the grammar's mask applied to the logits of a whole forward each."""
    folder = text_model_dir(end=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = from_tokenizer(transformers.AutoTokenizer.from_pretrained(folder), n_vocab=VOCAB, eos_token=END)
    matcher, tokens = LLMatcher(tokenizer, quote_grammar(TEXT, form)), list[int]()
    while len(tokens) < MOST:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        token = max(np.flatnonzero(bits[:VOCAB]), key=lambda one: float(logits[one]))
        if token == END:
            break
        matcher.consume_token(int(token))
        tokens.append(int(token))
    return tokens


@engine_test()
async def test_quotes_of_a_document_are_those_of_one_process(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    folder = Path(workers[0].local_directory)
    (folder / "docs").mkdir()
    (folder / "docs" / "a.txt").write_text(TEXT)
    save_pdf(folder / "docs" / "b.pdf", PAGES)
    async with Engine(client, str(text_model_dir(end=True)), **TINY) as engine:
        document = await engine.ingest(TEXT)
        assert len(document.placement) > 1
        ways: list[QuoteForm] = ["answer", "evidence"]
        done = await document.ask(["Who?"] * 2, [SamplingParams(MOST, quotes=way) for way in ways])
        for way, one in zip(ways, done, strict=True):
            assert one.error is None
            assert list(one.token_ids) == reference(document.prompt("Who?"), way)
            assert one.quote == Quoting(TEXT, way).find(one.text)
        assert done[0].quote is not None
        assert TEXT[done[0].quote.start : done[0].quote.stop] == done[0].quote.text

        await document.save(folder / "saved")
        await document.release()
        again = await engine.load(folder / "saved")
        asked = await again.ask("Who?", SamplingParams(MOST, quotes=True))
        assert (asked.text, asked.quote) == (done[0].text, done[0].quote)
        async with again.chat() as chat:
            said = await chat.ask("Who?", SamplingParams(MOST, quotes=True))
            assert said.quote == done[0].quote

        quotes = SamplingParams(MOST, quotes=True)
        for what in ([{"role": "user", "content": TEXT}], list(range(40))):
            other = await engine.ingest(what)
            with pytest.raises(InvalidRequestError, match="of a document that is a text"):
                other.submit("Who?" if isinstance(what[0], dict) else [1], quotes)
        with pytest.raises(InvalidRequestError, match="of a document that is a text"):
            engine.submit("Who?", quotes)

        ended = await engine.process(
            folder / "docs", questions=["Who?", "Why?"], out=folder / "out", sampling=quotes, progress=False
        )
        assert ended.errors == 0
        rows = pq.read_table(folder / "out").to_pylist()
        assert len(rows) == 4
        for row in rows:
            text = TEXT if row["path"] == "a.txt" else "".join(f"{page}\n\f" for page in PAGES)
            assert text[row["start"] : row["stop"]] == row["quote"] == row["answer"].strip()
            assert row["page"] == 1 + text.count("\f", 0, row["start"])

        table = pa.table({"text": [TEXT, "Only one line.", "..."], "page": [1, 2, 3]})
        evidence = SamplingParams(MOST, regex=None, quotes="evidence", temperature=1.0, seed=3)
        ended = await engine.process(table, question="Who?", out=folder / "ev", sampling=evidence, keep=[])
        for row in pq.read_table(folder / "ev").to_pylist():
            if row["row"] == 2:
                assert "nothing to quote" in row["error"]
            elif row["error"] is not None:
                assert "cut before its quote" in row["error"]
            else:
                assert row["quote"] in table["text"][row["row"]].as_py()
                assert (row["page"] is None) == (row["row"] == 1)
                assert "Quote:" not in row["answer"]


def test_a_quote_is_where_it_is_first() -> None:
    assert Quoting("one two\fone two", "answer").find("two") == Quote("two", 4, 7, 1)
    assert Quoting("one two", "answer").find(" two\N{REPLACEMENT CHARACTER}") == Quote("two", 4, 7, None)
    assert Quoting("one two", "answer").find("") is None
    assert Quoting("one two", "evidence").find("two") is None
