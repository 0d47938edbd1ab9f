"""Forwards that tasks carry from layer to layer, without Dask: the handoff, its ends, and the resulting tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from _fakes import GREEDY, NEW, PROMPT, Fleet, fleet, loaded, reference
from _models import prompt_ids

from distkv_dask.errors import ChannelTimeoutError, GangAbortedError, PlanError
from distkv_dask.gang import Gang, PrefillChunk
from distkv_dask.messages import from_worker as did
from distkv_dask.placement import Placement
from distkv_dask.worker.blocks.files import BlockFiles
from distkv_dask.worker.blocks.spilled import Spilled
from distkv_dask.worker.by_layer.paused import PausedForward
from distkv_dask.worker.by_layer.tasks import LayerTasks
from distkv_dask.worker.engine import WorkerEngine
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.tensor_message import TensorMessage

GANG = Gang("engine", 1, "gang-1", 1, "w0", ())
QUESTION, ANSWER = TensorMessage("asked", ()), TensorMessage("w1", (torch.ones(2),))


def test_questions_and_answers_meet_whoever_comes_first() -> None:
    forward = PausedForward(GANG, 20)
    with ThreadPoolExecutor(1) as lane, forward:
        for layer in range(3):
            if layer == 1:  # the task waits for the lane
                asked = lane.submit(lambda: (forward.ask(1, QUESTION), forward.wait_for_answers(1))[1])
            else:
                forward.ask(layer, QUESTION)
                asked = lane.submit(forward.wait_for_answers, layer)
            assert forward.question(layer) is QUESTION
            forward.answer(layer, [ANSWER])
            assert asked.result(20) == [ANSWER]
        forward.end()
        assert forward.question(3) is None


def test_a_task_that_waits_hears_that_the_forward_ended() -> None:
    forward = PausedForward(GANG, 20)
    with ThreadPoolExecutor(1) as task:
        waiting = task.submit(forward.question, 0)
        forward.end()
        assert waiting.result(20) is None


def test_answers_that_nobody_waits_for_are_refused() -> None:
    forward = PausedForward(GANG, 20)
    forward.ask(1, QUESTION)
    for layer in (0, 2):
        with pytest.raises(GangAbortedError, match=f"partials of layer {layer}"):
            forward.answer(layer, [])
    forward.answer(1, [ANSWER])
    with pytest.raises(GangAbortedError, match="layer 1"):
        forward.answer(1, [ANSWER])  # Dask ran a task twice
    assert forward.wait_for_answers(1) == [ANSWER]
    forward.end()
    with pytest.raises(GangAbortedError):
        forward.answer(1, [ANSWER])


def test_a_forward_ends_when_nobody_comes_or_its_gang_does() -> None:
    forward = PausedForward(GANG, 0.001)
    forward.ask(4, QUESTION)
    with pytest.raises(
        ChannelTimeoutError, match=r"no partials of layer 4 came to gang-1 within 0.001 s.*timeouts.start"
    ):
        forward.wait_for_answers(4)
    patient = PausedForward(GANG, 20)
    with ThreadPoolExecutor(1) as lane:
        waiting = lane.submit(patient.wait_for_answers, 0)
        patient.abort("a holder died")
        with pytest.raises(GangAbortedError, match="gang-1 was aborted: a holder died"):
            waiting.result(20)
    with pytest.raises(GangAbortedError, match="aborted"):
        patient.check()


# Tasks


def kinds(told: list[did.FromWorker]) -> list[str]:
    return [type(one).__name__ for one in told]


@contextmanager
def engines(
    model: LoadedModel, made: Fleet, folder: Path
) -> Iterator[dict[str, tuple[LayerTasks, WorkerEngine, list[did.FromWorker]]]]:
    """The tasks of an engine on every worker, and their messages to the gManager."""
    found = {}
    for name, member in made.members.items():
        told: list[did.FromWorker] = []
        files = BlockFiles(
            name, Spilled(member.pool, folder / name, made.spec.config, 0), made.spec.config, told.append
        )
        facts = did.Opened(
            name, member.lanes.endpoint, "instance", "", "cpu", member.pool.capacity_blocks, member.pool.block_bytes,
            0, 0, 64, model.geometry, "", None, "", "",
        )  # fmt: skip
        engine = WorkerEngine(member.runtime, model, files, facts, told.append)
        found[name] = LayerTasks(engine), engine, told
    yield found
    for _, engine, _ in found.values():
        engine.files.close()


def carried(tasks: dict, chunk: PrefillChunk, layers: int) -> int:
    """Run the tasks of one prompt chunk's graph one by one."""
    home, *_ = tasks[chunk.gang.home]
    holders = [tasks[one.worker][0] for one in chunk.gang.holders]
    question = home.begin_forward(chunk)
    for layer in range(layers):
        answers = [holder.attend(chunk.gang, question) for holder in holders]
        if layer + 1 < layers:
            question = home.layer(chunk.gang, layer + 1, answers)
    return home.finish(chunk.gang, layers, answers)


def prompt_of(made: Fleet, *before: tuple[str, int], tail: str = "w0") -> PrefillChunk:
    """The last chunk of a prompt whose first tokens are on these workers, and whose last ones go to ``tail``."""
    start = sum(tokens for _, tokens in before)
    placement: Placement = made.place(1, *before, (tail, PROMPT + NEW - start))
    prompt = prompt_ids(PROMPT)
    made.prefill(1, placement, prompt[:start], home="w0", sampling=None)
    holders = sorted({span.worker for span in placement} - {"w0"})
    return PrefillChunk(made.gang("w0", holders), 1, placement, start, tuple(prompt[start:]), GREEDY)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt-oss"])
@pytest.mark.parametrize(
    ("before", "tail"),
    [((), "w0"), ((("w1", 16),), "w0"), ((("w1", 16), ("w2", 16)), "w0"), ((("w0", 16),), "w1")],
    ids=["local", "a holder", "two holders", "the tail elsewhere"],
)
def test_a_prompt_carried_by_tasks_gets_the_token_of_one_process(
    tmp_path: Path, family: str, before: tuple, tail: str
) -> None:
    model = loaded(family)
    with fleet(model, 3) as made, engines(model, made, tmp_path) as tasks:
        chunk = prompt_of(made, *before, tail=tail)
        assert carried(tasks, chunk, len(model.geometry.far_layers)) == len(chunk.tokens)
        told = tasks["w0"][2]
        assert kinds(told) == ["ChunkStarted", "Prefilled"]
        assert told[-1].token == reference(family, PROMPT, 0, NEW).tokens[0]
        assert not made.members["w0"].runtime.paused


def test_a_forward_is_begun_once_and_known_until_it_ends(tmp_path: Path) -> None:
    model = loaded("llama-gqa")
    with fleet(model, 2) as made, engines(model, made, tmp_path) as tasks:
        chunk = prompt_of(made, ("w1", 16))
        home, engine, told = tasks["w0"]
        with pytest.raises(GangAbortedError, match=r"no forward of .* is paused here"):
            home.layer(chunk.gang, 1, [])
        assert home.begin_forward(chunk) is not None
        with pytest.raises(GangAbortedError, match="has already begun"):
            home.begin_forward(chunk)
        engine.abort(chunk.gang.number, "a holder died", unused=False)
        engine.lanes.home.submit(threading.get_ident).result(20)  # the lane is free again
        assert not made.members["w0"].runtime.paused
        with pytest.raises(GangAbortedError):
            home.layer(chunk.gang, 1, [])
        assert "Prefilled" not in kinds(told)


def test_a_holder_answers_for_its_own_blocks_only_and_tells_of_its_faults(tmp_path: Path) -> None:
    model = loaded("llama-gqa")
    with fleet(model, 3) as made, engines(model, made, tmp_path) as tasks:
        chunk = prompt_of(made, ("w1", 16))
        question = tasks["w0"][0].begin_forward(chunk)
        assert question is not None
        assert tasks["w2"][0].attend(chunk.gang, question) is None, "nothing is asked of it"
        made.members["w1"].runtime.release_sequence(1)
        with pytest.raises(PlanError):
            tasks["w1"][0].attend(chunk.gang, question)
        assert kinds(tasks["w1"][2]) == ["GangFailed"]
        tasks["w0"][1].abort(chunk.gang.number, "its holder failed", unused=False)
