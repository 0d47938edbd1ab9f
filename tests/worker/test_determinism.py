"""The same request gives the same tokens, bit for bit if possible, on any workers and in any batch."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from _channels import Way
from _fakes import NEW, PROMPT, ROOM, Fleet, Recorder, fleet, loaded, reference, state
from _models import model_dir, prompt_ids
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.gang import PrefillChunk
from distkv_dask.placement import Placement, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.channels.bodies import Row
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.sampling import Draw, sample_batch
from distkv_dask.worker.plan import Part, merge_order

SPREAD = [("w1", 16), ("w2", 24), ("w3", 16), ("w0", ROOM)]


@contextmanager
def slow(made: Fleet, workers: Sequence[str]) -> Iterator[None]:
    """Keep the holder lanes of some workers busy with something else most of the time."""
    over = threading.Event()

    def disturb(worker: str) -> None:
        while not over.is_set():
            made.members[worker].lanes.holder.submit(lambda: time.sleep(0.002)).result()

    threads = [threading.Thread(target=disturb, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_logits_do_not_depend_on_whose_partials_arrive_first(way: Way) -> None:
    model, right = Recorder(loaded("llama-gqa")), reference("llama-gqa").tokens
    with fleet(model, 4, way) as made:
        placement = made.place(1, *SPREAD)
        made.prefill(1, placement, prompt_ids(PROMPT))
        found = []
        for late in ([], ["w1"], ["w2"], ["w3"], ["w1", "w2"], ["w1", "w3"], ["w2", "w3"]):
            model.logits.clear()
            with slow(made, late):
                made.decode("w0", [state(1, placement, PROMPT, right[0], 4)], 4)
            found.append(torch.cat(model.logits))
    assert all(torch.equal(found[0], one) for one in found[1:])


def test_logits_do_not_depend_on_who_holds_which_span() -> None:
    model, right = Recorder(loaded("llama-gqa")), reference("llama-gqa").tokens
    found = []
    for workers in (("w1", "w2", "w3", "w0"), ("w3", "w1", "w2", "w0"), ("w2", "w0", "w1", "w3")):
        with fleet(model, 4) as made:
            rooms = [(worker, room) for worker, (_, room) in zip(workers, SPREAD, strict=True)]
            placement = made.place(1, *rooms)
            made.prefill(1, placement, prompt_ids(PROMPT))
            model.logits.clear()
            made.decode("w0", [state(1, placement, PROMPT, right[0], 4)], 4)
            found.append(torch.cat(model.logits))
    assert all(torch.equal(found[0], one) for one in found[1:])


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True), min_size=1, max_size=6), st.randoms())
def test_each_tokens_partials_are_merged_once_and_by_position(batch: list[list[int]], rng: random.Random) -> None:
    rows: dict[str, list[tuple[Row, int]]] = {}
    for token, workers in enumerate(batch):
        for at, worker in enumerate(workers):
            row = Row(token, 8, 1, at + 1 == len(workers), ((8 * at, 8 * at + 8),), (8 * len(workers),))
            rows.setdefault(f"w{worker}", []).append((row, token))
    names = list(rows)
    rng.shuffle(names)
    parts = {name: Part(tuple(row for row, _ in rows[name]), tuple(token for _, token in rows[name])) for name in names}
    merged: dict[int, list[str]] = {}
    for worker, query, token, queries in merge_order(parts):
        for at in range(queries):
            assert parts[worker].tokens[query + at] == token + at
            merged.setdefault(token + at, []).append(worker)
    assert merged == {token: [f"w{worker}" for worker in workers] for token, workers in enumerate(batch)}


DRAWN = SamplingParams(max_new_tokens=1000, temperature=1.0, seed=5, ignore_eos=True)


def drawn(new: int) -> list[int]:
    """Tokens drawn from the logits of plain transformers, with a whole forward for each token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir("llama-gqa"), dtype=torch.float32)
    tokens = prompt_ids(PROMPT)
    with torch.inference_mode():
        while len(tokens) < PROMPT + new:
            logits = model(torch.tensor([tokens])).logits[0, -1:]
            tokens += sample_batch(logits, [Draw(DRAWN, len(tokens))])  # type: ignore[arg-type]
    return tokens[PROMPT:]


@pytest.mark.parametrize("fate", ["local", "spread", "in turns", "moved", "recomputed"])
def test_drawn_tokens_are_those_of_one_process_whatever_becomes_of_the_sequence(fate: str) -> None:
    rooms = {"local": [("w0", ROOM)], "in turns": [(f"w{at % 3}", 8) for at in range(ROOM // 8 + 1)]}
    with fleet(loaded("llama-gqa"), 4) as made:
        placement = made.place(1, *rooms.get(fate, SPREAD))
        tokens = [made.prefill(1, placement, prompt_ids(PROMPT), sampling=DRAWN)]
        one = replace(state(1, placement, PROMPT, tokens[0], NEW - 1), sampling=DRAWN)
        result, (one,) = made.decode("w0", [one], 5)
        tokens += result.tokens[1]
        if fate in ("moved", "recomputed"):
            lost = placement[1]  # of w2, to w1
            made.members["w1"].runtime.reserve(1, lost.start, lost.stop)
            moved = (placement[0], replace(lost, worker="w1"), *placement[2:])
            if fate == "moved":
                source, target = made.members["w2"].pool, made.members["w1"].pool
                spans = [(lost.start, lost.stop)]
                for block, data in zip(target.find(1, spans), source.read(source.find(1, spans)), strict=True):
                    target.fill(block, data)
            made.members["w2"].runtime.release_sequence(1)
            if fate == "recomputed":
                lacking = tuple(prompt_ids(PROMPT)[lost.start : lost.stop])
                chunk = PrefillChunk(made.gang("w1", []), 1, moved, lost.start, lacking)
                made.run(chunk.gang, lambda runtime: runtime.prefill(chunk))
            one = replace(one, placement=moved)
        result, _ = made.decode("w0", [one], NEW)
        assert tokens + result.tokens[1] == drawn(NEW)


@cache
def deterministic(dtype: str) -> LoadedModel:
    return load_model(str(model_dir("llama-gqa")), dtype, 1, deterministic=True)


def drawn_beside(
    made: Fleet, model: Recorder, placement: Placement, others: int, chunk: int = 24, joined: int = 0
) -> tuple[list[int], torch.Tensor]:
    """Tokens of sequence 1 and their logits, while ``others`` sequences decode with it.

    After ``joined`` tokens, its KV is computed again, with these tokens as part of its prompt.
    """
    prompt = prompt_ids(PROMPT)
    first = made.prefill(1, placement, prompt, chunk, sampling=DRAWN)
    tokens, logits = [first], [model.logits[-1]]
    batch = []
    for number in range(2, 2 + others):
        place, length = made.place(number, ("w3", 64)), 3 * number
        token = made.prefill(number, place, prompt_ids(length, number), chunk)
        batch.append(state(number, place, length, token, 40))
    batch.insert(others // 2, replace(state(1, placement, PROMPT, first, NEW - 1), sampling=DRAWN))
    while len(tokens) < NEW:
        if len(tokens) == joined:
            made.release_sequence(1)
            for span in placement:
                made.members[span.worker].runtime.reserve(1, span.start, span.stop)
            made.prefill(1, placement, prompt + tokens[:-1], chunk)
        model.logits.clear()
        result, batch = made.decode("w0", batch, min(NEW - len(tokens), 4))
        logits += [step[others // 2][None] for step in model.logits]
        tokens += result.tokens[1]
    return tokens, torch.cat(logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_logits_have_the_same_bits_whatever_becomes_of_the_sequence(dtype: str) -> None:
    model = Recorder(deterministic(dtype))
    other_workers = [(worker, room) for worker, (_, room) in zip(("w2", "w0", "w1", "w3"), SPREAD, strict=True)]
    found = []
    for rooms, others, chunk, joined in (
        (SPREAD, 0, 24, 0),
        (SPREAD, 6, 24, 0),
        (SPREAD, 1, 7, 0),
        (SPREAD, 2, 1, 5),
        (SPREAD, 6, 5, 9),
        (other_workers, 4, 24, 5),
    ):
        with fleet(model, 4, deterministic=True) as made:
            found.append(drawn_beside(made, model, made.place(1, *rooms), others, chunk, joined))
    assert all(tokens == found[0][0] for tokens, _ in found)
    assert all(torch.equal(logits, found[0][1]) for _, logits in found)
    if dtype == "float32":  # other spans are rounded differently, but give the same tokens
        for rooms in ([("w0", ROOM)], [("w1", 48), ("w0", ROOM)]):
            with fleet(model, 4, deterministic=True) as made:
                assert drawn_beside(made, model, made.place(1, *rooms), 6)[0] == found[0][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_logits_have_the_same_bits_however_many_ask_about_one_document(dtype: str) -> None:
    model, text, question = Recorder(deterministic(dtype)), prompt_ids(40), prompt_ids(9, 1)
    found = []
    for others in (0, 1, 4, 6):
        with fleet(model, 2, deterministic=True) as made:
            document = made.place(100, ("w1", 16), ("w0", 24))
            made.prefill(100, document, text)
            batch = []
            for number in range(1, 2 + others):
                made.members["w0"].runtime.reserve(number, 40, 80)
                placement = (*(replace(span, document=100) for span in document), Span("w0", 40, 80))
                asked = tuple(question if number == 1 else prompt_ids(7, number))
                chunk = PrefillChunk(made.gang("w0", ["w1"]), number, placement, 40, asked, DRAWN)
                token = made.run(chunk.gang, lambda runtime, chunk=chunk: runtime.prefill(chunk)).token
                batch.insert(0, state(number, placement, 40 + len(asked), token, 20))
            model.logits.clear()
            made.decode("w0", batch, 5)
            found.append(torch.stack([step[-1] for step in model.logits]))
    assert all(torch.equal(logits, found[0]) for logits in found)
