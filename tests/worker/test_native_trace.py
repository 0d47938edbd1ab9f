"""A trace shows the code that runs: C++ records the layers that it exchanges, and results are the same bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _channels import TCP, Way
from _fakes import NEW, PROMPT, Recorder, fleet, generate, loaded, reference, state
from _models import prompt_ids

from distkv_dask.gang import Exchanged
from distkv_dask.messages.names import Span
from distkv_dask.worker.holder.session import Session
from distkv_dask.worker.home.python_exchange import PythonExchange
from distkv_dask.worker.native import marks as native_marks
from distkv_dask.worker.native import wire as native_wire

pytestmark = pytest.mark.skipif(native_wire.wire() is None, reason="the C++ libraries were not built")
AGREE = 10**7
"""Generous limit in nanoseconds on how far rings may differ in the time of day, which each reads once."""
SPLIT = ("w1", 32), ("w2", 32), ("w0", 48)


def run(
    way: Way, **settings: Any
) -> tuple[list[torch.Tensor], list[int], Exchanged, dict[tuple[str, str], list[Span]]]:
    """Run a window over a sequence on three workers; returns logits, tokens, exchanged bytes, and spans by lane."""
    model = Recorder(loaded("llama-gqa"))
    with fleet(model, 3, way, **settings) as made:
        placement = made.place(1, *SPLIT)
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        tracers = {name: member.runtime.tracer for name, member in made.members.items()}
        for tracer in tracers.values():
            if tracer is not None:
                tracer.take_spans()  # those of the prompt
        result, _ = made.decode("w0", [state(1, placement, PROMPT, first, NEW - 1)], NEW)
        taken = {name: {} if tracer is None else tracer.take_spans() for name, tracer in tracers.items()}
    assert not any(lost for lanes in taken.values() for _, lost in lanes.values())
    spans = {(name, lane): them for name, lanes in taken.items() for lane, (them, _) in lanes.items()}
    return model.logits, [first, *result.tokens[1]], result.exchanged, spans


@pytest.fixture
def in_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that no home exchanges layers in Python, and holders answer in Python only between two turns in C++."""
    answered = []

    def fail(*args: object) -> None:
        raise AssertionError("a layer was exchanged in Python")

    def take(session: Session) -> tuple[int, bool]:
        answered.append(original(session))
        return answered[-1]

    original = Session.take_from_native
    monkeypatch.setattr(PythonExchange, "__init__", fail)
    monkeypatch.setattr(Session, "take_from_native", take)
    yield
    assert any(count for count, _ in answered)


@pytest.mark.usefixtures("in_cpp")
def test_a_traced_window_runs_in_cpp_and_gives_the_same_logits_bit_for_bit() -> None:
    plain, tokens, _, nothing = run(TCP)
    traced, same, _, spans = run(TCP, trace="somewhere")
    assert tokens == same == reference("llama-gqa").tokens
    assert all(map(torch.equal, plain, traced))
    assert not nothing
    assert spans


@pytest.mark.usefixtures("in_cpp")
def test_spans_that_cpp_records_are_nested_in_order_and_add_up_to_what_was_sent() -> None:
    layers, steps = loaded("llama-gqa").geometry.layers, NEW - 1
    _, _, exchanged, spans = run(TCP, trace="somewhere")
    home = spans["w0", "home lane"]
    for them in spans.values():
        assert_nested(them)
    (window,) = [one for one in home if one.name == "window"]
    assert all(window.began <= one.began and one.ended <= window.ended for one in home)
    turns: dict[tuple[int, int], list[Span]] = {}
    for one in sorted(home, key=lambda one: (one.began, -one.ended)):
        if one.layer >= 0 and one.name != "model":
            turns.setdefault((one.step, one.layer), []).append(one)
    assert set(turns) == {(step, layer) for step in range(steps) for layer in range(layers)}
    for around, *inside in turns.values():
        assert around.name == "attention"
        assert all(around.began <= one.began and one.ended <= around.ended for one in inside)
        names = [one.name for one in inside]
        assert names[:3] == ["send", "send", "local attention"]
        assert names[3] == "wait"
        assert names[-1] == "merge"
        assert {one.peer for one in inside if one.name == "merge"} == {"w1", "w2"}
        covered = sum(one.ended - one.began for one in inside)
        assert 0 < covered <= around.ended - around.began
    sent = Counter[str]()
    for one in home:
        sent[one.name] += max(one.size, 0)
    assert (sent["send"], sent["wait"]) == (exchanged.sent_bytes, exchanged.received_bytes)
    for worker in ("w1", "w2"):
        holder = spans[worker, "holder lane"]
        answers = [(one.step, one.layer) for one in holder if one.name == "answer"]
        assert answers == [(step, layer) for step in range(steps) for layer in range(layers)]
        assert Counter(one.name for one in holder if one.name in ("attend", "send")) == {
            "attend": len(answers),
            "send": len(answers),
        }
        assert {one.peer for one in holder if one.name == "answer"} == {"w0"}
        asked = [one for one in home if one.name == "send" and one.peer == worker]
        assert [one.size for one in asked] == [one.size for one in holder if one.name == "answer"]
        attended = {(one.step, one.layer): one for one in holder if one.name == "attend"}
        for one in asked:  # before the answer for which the home waits
            attend, turn = attended[one.step, one.layer], turns[one.step, one.layer][0]
            assert one.began < attend.began + AGREE
            assert attend.ended < turn.ended + AGREE


@pytest.mark.usefixtures("in_cpp")
def test_what_finds_no_room_among_the_marks_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_marks, "CAPACITY", 3)
    with fleet(loaded("llama-gqa"), 3, TCP, trace="somewhere") as made:
        placement = made.place(1, *SPLIT)
        assert generate(made, placement, "w0") == reference("llama-gqa").tokens
        tracer = made.members["w0"].runtime.tracer
        assert tracer is not None
        spans, lost = tracer.take_spans()["home lane"]
    names = Counter(one.name for one in spans)
    assert names["send"] > 0
    assert names["merge"] == 0  # never among a layer's first three
    assert lost > 0


def assert_nested(lane: list[Span]) -> None:
    """Check that any two spans of a lane are disjoint, or one contains the other."""
    around: list[Span] = []
    for one in sorted(lane, key=lambda one: (one.began, -one.ended)):
        assert one.began <= one.ended
        while around and around[-1].ended <= one.began:
            around.pop()
        assert not around or one.ended <= around[-1].ended, (around[-1], one)
        around.append(one)
