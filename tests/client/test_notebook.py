"""Notebooks show engines, documents and completions correctly and escaped, even if the scheduler does not answer."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from distributed import Client, LocalCluster, Scheduler, Worker
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask import Completion, Engine, SamplingParams, svg
from distkv_dask.completion import Timings
from distkv_dask.placement import Span
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids

SHORT = SamplingParams(max_new_tokens=3, ignore_eos=True)
EVIL = "<script>alert('&')</script>"


def tiny(client: Client, **settings: Any) -> Engine:
    given = {"dtype": "float32", "kv_memory": "2 MiB", "block_tokens": 8} | settings
    return Engine(client, str(model_dir("llama-gqa")), **given)


def parsed(html: str) -> ElementTree.Element:
    """The picture as a tree: it is well-formed, so that it breaks no notebook around it."""
    return ElementTree.fromstring(html)


def widths(html: str) -> list[float]:
    return [float(one.get("width", "")) for one in parsed(html).iter() if one.tag.endswith("rect")]


def test_text_of_users_models_and_machines_cannot_become_markup() -> None:
    done = Completion(EVIL, (1,), 2, "length", placement=(Span(EVIL, 0, 3),))
    failed = Completion("", (), 0, "error", EVIL)
    for html in (done._repr_html_(), failed._repr_html_(), svg.card(EVIL, svg.table([(EVIL, "", EVIL)]))):
        assert "<script" not in html
        assert "alert(" in "".join(parsed(html).itertext())


def test_a_completion_shows_its_times_and_which_worker_held_how_much() -> None:
    placement = (Span("tcp://a:1", 0, 30, document=7), Span("tcp://b:2", 30, 40))
    html = Completion("yes", (1, 2), 39, "stop", None, Timings(1.25, 2.5, 3.75), placement, 30)._repr_html_()
    said = "".join(parsed(html).itertext())
    for words in ("1.25 s in the queue", "2.50 s of prefill", "3.75 s of decode", "30 reused", "tcp://a:1: 30", "yes"):
        assert words in said
    shared, own = widths(html)
    assert abs(shared / own - 3) < 0.1
    assert len(set(re.findall(r'rect[^>]*fill="(#\w+)"', html))) == 2


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 10**6)), max_size=300))
def test_a_strip_stays_within_its_width_whatever_the_placement(spans: list[tuple[int, int]]) -> None:
    pieces, end = [], 0
    for worker, tokens in spans:
        pieces.append(svg.Piece(f"w{worker}", end, end + tokens))
        end += tokens
    html = f"<div>{svg.spans(pieces)}</div>"
    assert sum(widths(html)) <= svg.WIDTH + len(pieces)  # every piece is visible: at least a pixel
    assert html.count("white-space:nowrap") <= svg.LEGEND


def test_nothing_is_fetched_from_anywhere_and_text_has_the_notebooks_own_colour() -> None:
    html = Completion("yes", (1,), 5, "stop", placement=(Span("a", 0, 6),))._repr_html_()
    assert not re.search(r"(src|href|@import|url\()", html.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    html += svg.table([("a", "", "b")])
    assert set(re.findall(r"[;\"]color:([^;\"]*)", html)) == {"inherit"}


def test_engine_and_document_show_where_their_kv_lies_until_they_are_closed() -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        tiny(client) as engine,
    ):
        document = engine.ingest(prompt_ids(800), name=EVIL)
        html = engine._repr_html_()
        said = "".join(parsed(html).itertext())
        assert EVIL in said
        assert all(worker in said for worker in engine.status().workers)
        placement = engine.status().sequences[document.number].placement
        assert len({span.worker for span in placement}) == 2
        shown = document._repr_html_()
        assert shown.count("<rect") == len(placement)
        assert f"{document.tokens:,} tokens" in "".join(parsed(shown).itertext())
        document.release()
        assert "released" in document._repr_html_()
        rest = engine.ingest(prompt_ids(40))
    assert "closed" in engine._repr_html_()
    assert rest._repr_html_().count("<rect") == 1  # its former placement


@engine_test(2)
async def test_asynchronous_engines_are_shown_without_awaiting(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    engine = tiny(client)
    assert "not open yet" in engine._repr_html_()
    async with engine:
        document = await engine.ingest(prompt_ids(800), name="book")
        assert "await engine.status()" in engine._repr_html_()
        assert document._repr_html_().count("<rect") == len(document.placement) > 0
        done = await document.ask(prompt_ids(8, 1), SHORT)
        assert "fill-opacity" in done._repr_html_()
        assert done.timings.queued + done.timings.prefill + done.timings.decode > 0
