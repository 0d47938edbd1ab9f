"""The same request gives the same tokens, bit for bit where that is possible, wherever and beside whatever it runs."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers
from _channels import Way
from _fakes import NEW, PROMPT, ROOM, Fleet, Recorder, fleet, loaded, reference, state
from _models import model_dir, prompt_ids
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.types import PrefillChunk, SamplingParams
from distkv_dask.worker.plan import Part, merge_order
from distkv_dask.worker.sampling import Draw, sample_batch
from distkv_dask.worker.wire import Row

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
            row = Row(token, 8, 1, at + 1 == len(workers), ((8 * at, 8 * at + 8),))
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
    """What is drawn from the logits of a whole forward of plain transformers for each token."""
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
                target.bytes[target.find(1, spans)] = source.bytes[source.find(1, spans)]
            made.members["w2"].runtime.release(1)
            if fate == "recomputed":
                lacking = tuple(prompt_ids(PROMPT)[lost.start : lost.stop])
                chunk = PrefillChunk(made.gang("w1", []), 1, moved, lost.start, lacking)
                made.run(chunk.gang, lambda runtime: runtime.prefill(chunk))
            one = replace(one, placement=moved)
        result, _ = made.decode("w0", [one], NEW)
        assert tokens + result.tokens[1] == drawn(NEW)
