"""Chunks of prompts with a trivial model: every token is computed once at its position, and scored correctly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import ModelError
from distkv_dask.gang import Exchanged, Gang, PrefillChunk
from distkv_dask.placement import Placement, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.device import HOST
from distkv_dask.worker.home.home_state import Begun, Ended
from distkv_dask.worker.home.prefill import PrefillRun, begun, ended
from distkv_dask.worker.plan import Part, Stored, cut

VOCAB = 13
GANG = Gang("engine", 1, "gang-1", 1, "w0", ())


def logits_of(token: int, position: int) -> list[float]:
    """The model's logits at a token's position."""
    return [math.sin(1 + 3 * token + 5 * position + 7 * other) * 4 for other in range(VOCAB)]


class Model:
    """Computes :func:`logits_of` where needed; ``calls`` has tokens with positions, forward by forward."""

    def __init__(self, scan_once: bool = False) -> None:
        self.device, self.geometry = HOST, SimpleNamespace(scan_once=scan_once)
        self.calls: list[list[tuple[int, int]]] = []
        self.kept: list[int] = []

    def adapter(self, _: Any) -> None:
        return None

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, step: Any, keep: torch.Tensor, past: Any, take: Any = None
    ) -> Any:
        both = list(zip(tokens.tolist(), positions.tolist(), strict=True))
        self.calls.append(both)
        self.kept.append(len(keep))
        if past is not None:
            past.is_empty = False
        if take is not None:
            take(torch.tensor([logits_of(*one) for one in both]))
        return torch.tensor([logits_of(*both[at]) for at in keep.tolist()]).view(-1, VOCAB)


class Run:
    """A run over chunks that records what holders are told."""

    def __init__(self, model: Model) -> None:
        self.told: list[tuple[int, Mapping[str, Part]]] = []
        self.closed = 0
        gang: Any = SimpleNamespace(open_sessions=self._open_sessions, change=self._change)
        self.run = PrefillRun(gang, model, self._attention, cut)  # type: ignore[arg-type]

    def _open_sessions(self, parts: Mapping[str, Part]) -> None:
        assert not self.told
        self.told.append((0, parts))

    def _change(self, step: int, old: Mapping[str, Part], new: Mapping[str, Part]) -> None:
        assert old == self.told[-1][1]
        self.told.append((step, new))

    def _attention(self, parts: Mapping[str, Part], batch: Sequence[Stored], step: int) -> Any:
        assert self.told[-1] == (step, parts)
        return SimpleNamespace(exchanged=Exchanged(sent_bytes=1), close=self._close)

    def _close(self) -> None:
        self.closed += 1


def placed(*stops: int) -> Placement:
    """Spans that end there."""
    return tuple(
        Span(f"w{at % 3}", start, stop) for at, (start, stop) in enumerate(zip((0, *stops), stops, strict=False))
    )


@st.composite
def chunks(draw: st.DrawFn, spans: int, sequence: int = 1) -> PrefillChunk:
    """A chunk in at most ``spans`` spans, with targets after some of its tokens."""
    stops = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=spans)))
    start = draw(st.integers(0, stops[-1] - 1))
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=stops[-1] - start))
    targets = draw(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=3, unique=True), max_size=len(tokens)))
    last = SamplingParams() if draw(st.booleans()) else None
    return PrefillChunk(
        GANG, sequence, placed(*stops), start, tuple(tokens), last,
        targets=tuple(map(tuple, targets)), best=draw(st.integers(0, 3)),
    )  # fmt: skip


def logprob(token: int, position: int, target: int) -> float:
    """Natural log probability by definition."""
    scores = logits_of(token, position)
    return scores[target] - math.log(math.fsum(map(math.exp, scores)))


def check_scores(chunk: PrefillChunk, scored: Sequence[Any]) -> None:
    """Check the scores of a chunk, in the order of its tokens and targets."""
    places = [(chunk.tokens[at], chunk.start + at) for at, some in enumerate(chunk.targets) for _ in some]
    wanted = [target for some in chunk.targets for target in some]
    assert [one.token_id for one in scored] == wanted
    for one, place in zip(scored, places, strict=True):
        assert one.logprob == pytest.approx(logprob(*place, one.token_id), abs=1e-5)
        order = sorted(range(VOCAB), key=lambda other: -logits_of(*place)[other])
        assert [token for token, _ in one.best] == order[: chunk.best]
        for token, value in one.best:
            assert value == pytest.approx(logprob(*place, token), abs=1e-5)


@settings(max_examples=examples(150), deadline=None)
@given(chunks(4))
def test_a_chunk_is_computed_span_by_span_each_token_once(chunk: PrefillChunk) -> None:
    model = Model()
    run = Run(model)
    logits = run.run.run([chunk], None)
    assert [one for call in model.calls for one in call] == [
        (token, chunk.start + at) for at, token in enumerate(chunk.tokens)
    ]
    borders = {span.stop for span in chunk.placement}
    assert all(at not in borders for call in model.calls for _, at in call[1:]), "a step's KV lies in one span"
    assert all(call[0][1] in borders for call in model.calls[1:])
    assert run.closed == len(model.calls) == run.run.exchanged.sent_bytes
    check_scores(chunk, run.run.scored[0])
    assert len(logits) == (chunk.sampling is not None)
    if chunk.sampling is not None:
        assert logits[0].tolist() == pytest.approx(logits_of(chunk.tokens[-1], chunk.stop - 1), abs=1e-5)
    needed = {at for at, some in enumerate(chunk.targets) if some}
    needed |= {len(chunk.tokens) - 1} if chunk.sampling is not None else set()
    assert sum(model.kept) == len(needed), "logits of other tokens are not computed"


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(chunks(1), min_size=1, max_size=4))
def test_chunks_of_one_forward_are_scored_and_drawn_each_for_itself(some: list[PrefillChunk]) -> None:
    model = Model()
    run = Run(model)
    logits = run.run.run(some, None)
    assert len(model.calls) == 1
    drawing = [chunk for chunk in some if chunk.sampling is not None]
    assert len(logits) == len(drawing)
    for row, chunk in zip(logits.tolist(), drawing, strict=True):
        assert row == pytest.approx(logits_of(chunk.tokens[-1], chunk.stop - 1), abs=1e-5)
    for chunk, scored in zip(some, run.run.scored, strict=True):
        check_scores(chunk, scored)


def test_a_run_scores_its_last_chunks_alone() -> None:
    run = Run(Model())
    chunk = PrefillChunk(GANG, 1, placed(8), 0, (1, 2), None, targets=((3,), (4,)))
    run.run.run([chunk], None)
    first = run.run.scored
    run.told.clear()
    run.run._step = 0
    run.run.run([chunk], None)
    assert len(run.run.scored[0]) == len(first[0]) == 2


@pytest.mark.parametrize("scan_once", [False, True])
def test_a_state_that_cannot_take_several_tokens_gets_them_one_by_one(scan_once: bool) -> None:
    chunk = PrefillChunk(GANG, 1, placed(4, 20), 2, tuple(range(1, 8)), SamplingParams())
    model, past = Model(scan_once), SimpleNamespace(is_empty=False)
    Run(model).run.run([chunk], past)  # type: ignore[arg-type]
    assert [len(call) for call in model.calls] == ([1] * 7 if scan_once else [2, 5])
    model, empty = Model(scan_once), SimpleNamespace(is_empty=True)
    Run(model).run.run([chunk], empty)  # type: ignore[arg-type]
    assert [len(call) for call in model.calls] == ([2] + [1] * 5 if scan_once else [2, 5])


def test_logits_that_are_not_finite_are_an_error_and_the_attention_is_closed() -> None:
    class Broken(Model):
        def forward(self, *given: Any) -> Any:
            return super().forward(*given) * torch.nan

    run = Run(Broken())
    with pytest.raises(ModelError, match="prompt token are not finite"):
        run.run.run([PrefillChunk(GANG, 1, placed(8), 0, (1,), None, targets=((3,),))], None)
    assert run.closed == 1


@pytest.mark.parametrize("snapshot", [False, True])
def test_what_a_home_keeps_of_chunks_is_named_before_and_after(snapshot: bool) -> None:
    some = [
        PrefillChunk(GANG, 1, placed(8), 2, (1, 2, 3), None, snapshot=snapshot),
        PrefillChunk(GANG, 2, placed(8), 0, (1,), None),
    ]
    assert list(begun(some)) == [Begun(1, 2, 5), Begun(2, 0, 1)]
    assert list(ended(some, None)) == [Ended(1, 5, None, snapshot), Ended(2, 1, None)]
    past: Any = SimpleNamespace(state=lambda row: {"row": row})
    assert [one.state for one in ended(some, past)] == [{"row": 0}, {"row": 1}]


@settings(max_examples=examples(150), deadline=None)
@given(st.data())
def test_hidden_states_are_summed_over_the_wanted_tokens_of_each_chunk_and_no_others(data: st.DataObject) -> None:
    together = data.draw(st.booleans())
    some = [
        data.draw(chunks(1 if together else 4, number)) for number in range(data.draw(st.integers(1, 4 * together + 1)))
    ]
    wanted = [data.draw(st.none() | st.integers(one.start, one.stop - 1)) for one in some]
    some = [replace(one, pooled_from=first) for one, first in zip(some, wanted, strict=True)]
    run = Run(Model())
    run.run.run(some, None)
    for chunk, first, found in zip(some, wanted, run.run.pooling.results(), strict=True):
        if first is None:
            assert found is None
            continue
        assert found is not None
        assert found[:2] == (first, chunk.stop)
        places = [(chunk.tokens[at - chunk.start], at) for at in range(first, chunk.stop)]
        expected = [math.fsum(column) for column in zip(*(logits_of(*place) for place in places), strict=True)]
        assert np.frombuffer(found.sums, "<f8").tolist() == pytest.approx(expected, abs=2e-5)
