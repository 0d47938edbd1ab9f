"""Chunks that wait for a home's lane are computed in one forward, and each has the same tokens as alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from _channels import TCP
from _fakes import GREEDY, Fleet, Recorder, fleet, loaded, reference, state
from _models import choice_probabilities, model_dir, prompt_ids

from distkv_dask.errors import GangAbortedError, PlanError
from distkv_dask.gang import ChunkResult, PrefillChunk
from distkv_dask.messages import from_worker as did
from distkv_dask.placement import Placement, Span
from distkv_dask.worker.blocks.files import BlockFiles
from distkv_dask.worker.blocks.spilled import Spilled
from distkv_dask.worker.engine import WorkerEngine

LENGTHS = {1: 31, 2: 9, 3: 1, 4: 44}
NEW = 8


def whole(made: Fleet, sequence: int, length: int) -> PrefillChunk:
    """A prompt in one chunk, all at one worker."""
    placement = made.place(sequence, ("w0", length + NEW))
    return PrefillChunk(made.gang("w0", []), sequence, placement, 0, tuple(prompt_ids(length, sequence)), GREEDY)


def decoded(made: Fleet, chunk: PrefillChunk, first: int) -> list[int]:
    """The whole answer."""
    result, _ = made.decode("w0", [state(chunk.sequence, chunk.placement, chunk.stop, first, NEW - 1)], NEW)
    return [first, *result.tokens[chunk.sequence]]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt-oss", "deepseek-v3"])
def test_prompts_of_one_forward_have_the_tokens_that_each_has_alone(family: str, deterministic: bool) -> None:
    model = Recorder(loaded(family))
    with fleet(model, 1, TCP, deterministic=deterministic) as made:
        chunks = [whole(made, sequence, length) for sequence, length in LENGTHS.items()]
        begun = replace(chunks[3], tokens=chunks[3].tokens[:20], sampling=None)
        goes_on = replace(chunks[3], start=20, tokens=chunks[3].tokens[20:])
        assert made.run(begun.gang, lambda runtime: runtime.prefill_together([begun])) == [ChunkResult()]
        some = [*chunks[:3], goes_on]
        model.logits.clear()
        results = made.run(some[0].gang, lambda runtime: runtime.prefill_together(some))
        assert len(model.logits) == 1
        for chunk, result in zip(some, results, strict=True):
            expected = reference(family, LENGTHS[chunk.sequence], chunk.sequence, NEW).tokens
            assert decoded(made, chunk, result.token) == expected


def test_choices_of_many_questions_are_scored_in_one_forward_a_path() -> None:
    choices = (7,), (9, 3), (9, 4, 5), (9, 4, 6, 2), (11, 12, 13)
    model = Recorder(loaded("llama-gqa"))
    with fleet(model, 1) as made:
        chunks = [replace(whole(made, sequence, length), choices=choices) for sequence, length in LENGTHS.items()]
        results = made.run(chunks[0].gang, lambda runtime: runtime.prefill_together(chunks))
    assert [len(logits) for logits in model.logits] == [4, 4 * 3, 4 * 2], "the prompts' ends, 9 4 6, and 11 12"
    for chunk, result in zip(chunks, results, strict=True):
        expected = choice_probabilities(model_dir("llama-gqa"), chunk.tokens, choices)
        assert result.chosen.scores == pytest.approx(expected, abs=1e-4)


def test_questions_of_one_forward_share_their_document() -> None:
    with fleet(loaded("llama-gqa"), 1) as made:
        text = prompt_ids(32)
        made.prefill(100, (document := made.place(100, ("w0", 32))), text, sampling=None)
        chunks = []
        for sequence, length in ((1, 5), (2, 11), (3, 5)):
            own = prompt_ids(length, sequence)
            made.members["w0"].runtime.reserve(sequence, 32, 32 + length + NEW)
            placement: Placement = (replace(document[0], document=100), Span("w0", 32, 32 + length + NEW))
            chunks.append(PrefillChunk(made.gang("w0", []), sequence, placement, 32, tuple(own), GREEDY))
        results = made.run(chunks[0].gang, lambda runtime: runtime.prefill_together(chunks))
        answers = [decoded(made, chunk, result.token) for chunk, result in zip(chunks, results, strict=True)]
        for chunk, answer in zip(chunks, answers, strict=True):
            made.release_sequence(chunk.sequence)
            alone = made.place(chunk.sequence, ("w0", 32 + len(chunk.tokens) + NEW))
            first = made.prefill(chunk.sequence, alone, [*text, *chunk.tokens])
            assert answer == decoded(made, replace(chunk, placement=alone), first)


# Tasks


@contextmanager
def tasks(family: str, folder: Path) -> Iterator[tuple[Fleet, WorkerEngine, list[did.FromWorker]]]:
    """An engine on a worker, and its messages to the gManager."""
    model, told = loaded(family), list[did.FromWorker]()
    with fleet(model, 2) as made:
        member, config = made.members["w0"], made.spec.config
        files = BlockFiles("w0", Spilled(member.pool, folder, config, 0), config, told.append)
        facts = did.Opened(
            "w0", member.lanes.endpoint, role="instance", channels="", device="cpu", kernels="", weights="",
            capacity_blocks=member.pool.capacity_blocks, block_bytes=member.pool.block_bytes, spill_bytes=0,
            host_bytes=0, places=64, geometry=model.geometry, fingerprint="", measured=None,
        )  # fmt: skip
        yield made, WorkerEngine(member.runtime, model, files, facts, told.append), told
        files.close()


@contextmanager
def busy(engine: WorkerEngine) -> Iterator[None]:
    """Keep the lane busy with other work."""
    begun, leave = threading.Event(), threading.Event()
    engine.lanes.home.submit(lambda: (begun.set(), leave.wait(60)))
    begun.wait(60)
    try:
        yield
    finally:
        leave.set()


def computed(engine: WorkerEngine, chunks: list[PrefillChunk]) -> list[Exception | None]:
    """Results of tasks that all wait for a busy lane, in their order."""
    with ThreadPoolExecutor(len(chunks)) as threads, busy(engine):
        futures: list[Future[int]] = []
        for chunk in chunks:
            waiting = len(engine.lanes.home._calls)
            futures.append(threads.submit(engine.chunks.prefill, chunk))
            while len(engine.lanes.home._calls) == waiting:
                time.sleep(0.001)
    return [future.exception(60) for future in futures]


def kinds(told: list[did.FromWorker]) -> list[str]:
    return [type(one).__name__ for one in told]


def firsts(told: list[did.FromWorker]) -> dict[int, int]:
    return {one.sequence: one.token for one in told if isinstance(one, did.Prefilled)}


def right(lengths: dict[int, int], family: str = "llama-gqa") -> dict[int, int]:
    return {sequence: reference(family, length, sequence, NEW).tokens[0] for sequence, length in lengths.items()}


def test_short_chunks_that_wait_are_computed_at_once_and_each_is_told_of(tmp_path: Path) -> None:
    with tasks("llama-gqa", tmp_path) as (made, engine, told):
        assert computed(engine, [whole(made, *one) for one in LENGTHS.items()]) == [None] * 4
    assert kinds(told) == ["ChunkStarted"] * 4 + ["Prefilled"] * 4
    assert firsts(told) == right(LENGTHS)


@pytest.mark.parametrize("family", ["llama-gqa", "lfm2"])
def test_a_forward_has_no_more_tokens_than_a_chunk_no_other_holders_than_its_first_and_no_states(
    tmp_path: Path, family: str
) -> None:
    lengths = {1: 300, 2: 200, 3: 100, 4: 12}
    with tasks(family, tmp_path) as (made, engine, told):
        chunks = [whole(made, *one) for one in lengths.items()]
        away = made.place(5, ("w1", 8), ("w0", 40))
        made.prefill(5, away, prompt_ids(8, 5), sampling=None, home="w0")
        gang = made.gang("w0", ["w1"])
        session = made.members["w1"].runtime.open_session(gang)
        chunks.insert(1, PrefillChunk(gang, 5, away, 8, tuple(prompt_ids(9, 6)), None))
        assert computed(engine, chunks) == [None] * 5
        session.wait(60)
    apart = ["ChunkStarted", "Prefilled"]
    if family == "lfm2":
        assert kinds(told) == [*apart, "ChunkStarted", "ChunkDone", *apart * 3]
    else:
        together = ["ChunkStarted"] * 3 + ["Prefilled"] * 3  # 300, 200 and 12 tokens
        beside_holders = ["ChunkStarted"] * 2 + ["ChunkDone", "Prefilled"]  # the one with holders, and 100 tokens
        assert kinds(told) == [*together, *beside_holders]
    assert firsts(told) == right(lengths, family)


def test_a_chunk_that_fails_or_was_given_up_fails_alone(tmp_path: Path) -> None:
    with tasks("llama-gqa", tmp_path) as (made, engine, told):
        chunks = [whole(made, *one) for one in LENGTHS.items()]
        made.release_sequence(2)  # a fault of the plan
        engine.abort(chunks[2].gang.number, "nobody wants it", unused=False)
        errors = computed(engine, chunks)
    assert [type(error) for error in errors] == [type(None), PlanError, GangAbortedError, type(None)]
    assert firsts(told) == right({sequence: LENGTHS[sequence] for sequence in (1, 4)})
    (failed,) = (one for one in told if isinstance(one, did.GangFailed))
    assert failed.gang == chunks[1].gang.number
