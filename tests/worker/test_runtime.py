"""Wherever a sequence's KV is, its tokens are those that one process computes."""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from _channels import Way
from _fakes import GREEDY, NEW, PROMPT, ROOM, Recorder, advanced, fleet, generate, loaded, reference, state
from _models import prompt_ids

from distkv_dask import ModelError
from distkv_dask.gang import DecodeWindow, Gang, PrefillChunk, SequenceState, WindowResult
from distkv_dask.sampling import SamplingParams

FAMILIES = ["llama-mha", "llama-gqa", "llama-mqa", "qwen3"]  # head dims 64, 64, 80, 128

SPLITS = {
    "all at home": [("w0", ROOM)],
    "all at a holder": [("w1", ROOM)],
    "tail at home": [("w1", 48), ("w0", ROOM)],
    "tail remote": [("w0", 48), ("w1", ROOM)],
    "one token remote": [("w1", 1), ("w0", ROOM)],
    "one token at home": [("w0", 1), ("w1", ROOM)],
    "one token before the tail": [("w0", PROMPT - 1), ("w1", 1), ("w2", ROOM)],
    "tail begins with decode": [("w0", PROMPT), ("w1", ROOM)],
    "tail moves on while decoding": [("w1", 40), ("w0", PROMPT - 40 + 3), ("w2", 4), ("w3", 2), ("w4", ROOM)],
    "an empty span ahead": [("w1", 33), ("w0", ROOM), ("w2", 16)],
    "spans without room": [("w1", 0), ("w2", 33), ("w3", 0), ("w0", ROOM)],
    "five workers": [("w3", 17), ("w1", 5), ("w4", 30), ("w0", 11), ("w2", ROOM)],
    "a holder has two spans": [("w1", 32), ("w0", 16), ("w1", 16), ("w0", ROOM)],
    "all in turns, the tail too": [(f"w{at % 3}", 8) for at in range(ROOM // 8 + 1)],
    "a holder's second span grows": [("w1", 24), ("w0", 24), ("w1", ROOM)],
}


def block_tokens(room: list[tuple[str, int]]) -> int:
    """The largest block size of which all inner borders of a split are multiples."""
    ends = list(itertools.accumulate(tokens for _, tokens in room))
    return next(size for size in (8, 4, 2, 1) if not any(end % size for end in ends[:-1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logits_are_those_of_one_process_for_every_split(family: str) -> None:
    model = Recorder(loaded(family))
    right = reference(family)
    for size in (8, 4, 2, 1):
        splits = {name: room for name, room in SPLITS.items() if block_tokens(room) == size}
        with fleet(model, 5, block_tokens=size) as made:
            for name, room in splits.items():
                model.logits.clear()
                placement = made.place(1, *room)
                assert generate(made, placement, "w0") == right.tokens, name
                logits = torch.cat(model.logits[-NEW:])
                assert torch.allclose(logits, right.logits, atol=1e-4, rtol=1e-4), name
                made.release_sequence(1)
            assert all(member.pool.used_blocks == 0 for member in made.members.values())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_any_number_of_workers_and_any_chunks_give_the_same_tokens(size: int, chunk: int) -> None:
    with fleet(loaded("llama-gqa"), size, block_tokens=1) as made:
        share = -(-ROOM // size)
        placement = made.place(1, *((worker, share) for worker in made.members))
        for home in made.members:
            assert generate(made, placement, home, chunk=chunk) == reference("llama-gqa").tokens


@pytest.mark.parametrize("room", [[("w1", ROOM)], [("w0", 30), ("w1", 20), ("w2", ROOM)], [("w1", 30), ("w0", ROOM)]])
def test_one_home_can_compute_chunks_whose_kv_belongs_to_others(way: Way, room: list[tuple[str, int]]) -> None:
    with fleet(loaded("qwen2"), 3, way, block_tokens=2) as made:
        placement = made.place(1, *room)
        gang = made.gang("w0", [worker for worker, _ in room if worker != "w0"])
        ids = tuple(prompt_ids(PROMPT))
        chunk = PrefillChunk(gang, 1, placement, 0, ids, GREEDY)  # crosses spans
        first = made.run(gang, lambda runtime: runtime.prefill(chunk)).token
        result, _ = made.decode("w0", [state(1, placement, PROMPT, first, NEW - 1)], NEW)
        assert [first, *result.tokens[1]] == reference("qwen2").tokens


def test_sequences_join_at_different_windows_and_leave_when_they_stop(way: Way) -> None:
    family, lengths = "llama-gqa", (70, 9, 33, 50)
    rooms = [
        [("w1", 40), ("w0", 60)],
        [("w0", 40)],
        [("w0", 20), ("w2", 60)],
        [("w2", 16), ("w1", 16), ("w0", 50)],
    ]
    counts = (14, 4, 9, 11)
    with fleet(loaded(family), 3, way, block_tokens=4) as made:
        tokens: dict[int, list[int]] = {}
        waiting = list(enumerate(zip(lengths, rooms, counts, strict=True)))
        batch: list[SequenceState] = []
        while waiting or batch:
            if waiting:
                sequence, (length, room, count) = waiting.pop(0)
                placement = made.place(sequence, *room)
                first = made.prefill(sequence, placement, prompt_ids(length, sequence))
                tokens[sequence] = [first]
                batch.append(state(sequence, placement, length, first, count - 1))
            result, batch = made.decode("w0", batch, 3)
            for sequence, new in result.tokens.items():
                tokens[sequence] += new
        for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            assert tokens[sequence] == reference(family, length, sequence).tokens[:count]


def test_homes_that_hold_for_each_other_do_not_deadlock(way: Way) -> None:
    with fleet(loaded("llama-gqa"), 2, way) as made:
        for sequence, (first, second) in enumerate((("w0", "w1"), ("w1", "w0"))):
            placement = made.place(sequence, (second, 40), (first, ROOM))
            made.prefill(sequence, placement, prompt_ids(PROMPT))
        results = {}

        def run(sequence: int, home: str, other: str) -> None:
            placement = made.place(sequence, (other, 40), (home, ROOM))
            token = reference("llama-gqa").tokens[0]
            results[home], _ = made.decode(home, [state(sequence, placement, PROMPT, token, NEW - 1)], NEW)

        threads = [threading.Thread(target=run, args=args) for args in ((0, "w0", "w1"), (1, "w1", "w0"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results["w0"].tokens[0] == results["w1"].tokens[1] == reference("llama-gqa").tokens[1:]


def test_an_end_of_sequence_token_ends_its_sequence_alone_and_is_not_returned() -> None:
    tokens = reference("llama-gqa").tokens
    model = Recorder(loaded("llama-gqa"))
    at = next(at for at in range(2, NEW) if tokens[at] not in tokens[:at])
    model.eos_token_ids = frozenset({tokens[at]})
    with fleet(model, 2) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        other = made.place(2, ("w1", 40), ("w0", ROOM))
        for sequence, where in ((1, placement), (2, other)):
            made.prefill(sequence, where, prompt_ids(PROMPT))
        batch = [
            state(1, placement, PROMPT, tokens[0], NEW - 1, ignore_eos=False),
            state(2, other, PROMPT, tokens[0], NEW - 1),
        ]
        result, left = made.decode("w0", batch, 100)
        assert result.tokens == {1: tokens[1:at], 2: tokens[1:]}
        assert result.finished == {1: "stop", 2: "length"}
        assert result.steps == NEW - 1
        assert left == []


def test_a_window_ends_in_time_and_counts_its_steps() -> None:
    with fleet(loaded("llama-gqa"), 1) as made:
        placement = made.place(1, ("w0", ROOM))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        window = DecodeWindow(made.gang("w0", []), 0, 100, 0.0)
        batch = [state(1, placement, PROMPT, first, NEW)]
        result = made.run(window.gang, lambda runtime: runtime.decode(window, batch))
        assert (result.steps, len(result.tokens[1]), result.finished) == (1, 1, {})


def test_a_window_that_is_run_again_draws_the_same_tokens() -> None:
    sampled = SamplingParams(temperature=1.5, top_p=0.9, seed=5, repetition_penalty=1.2, ignore_eos=True)
    with fleet(loaded("llama-gqa"), 2) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        one = SequenceState(1, placement, PROMPT, first, NEW, sampled, array("i", prompt_ids(PROMPT)), (first,))
        results = [made.decode("w0", [one], NEW)[0].tokens for _ in range(3)]
        halves = made.decode("w0", [one], 5)[0].tokens[1]
        rest = advanced(one, halves)
        halves = halves + made.decode("w0", [rest], NEW)[0].tokens[1]
        assert results[0] == results[1] == results[2] == {1: halves}
        assert len(set(halves)) > 3


class Poisoned(Recorder):
    """A model with broken logits, or schemas, for some sequences, selected by their last token."""

    def __init__(self, model: Any, logits: dict[int, float], schema: str = "") -> None:
        super().__init__(model)
        self._poison, self._schema = logits, schema
        self.follower = self._follow

    def _follow(self, sampling: SamplingParams, generated: Sequence[int] = ()) -> Any:
        return None if sampling.schema is None else Broken(self._schema)

    def forward(self, token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits = super().forward(token_ids, *rest)
        for row, token in enumerate(token_ids[-len(logits) :].tolist()):
            if token in self._poison:
                logits[row, 3] = self._poison[token]
        return logits


class Broken:
    """A follower that fails when it is made, asked, or told a token."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._fail("made")

    def _fail(self, where: str) -> None:
        if where == self._where:
            raise RuntimeError(f"broken when {where}")

    def forbidden(self, vocab: int) -> torch.Tensor:
        self._fail("asked")
        return torch.zeros(vocab, dtype=torch.bool)

    def take_token(self, token: int) -> None:
        self._fail("told")


CULPRITS: dict[str, tuple[dict[str, Any], dict[int, float], str]] = {
    "nan": ({}, {7: float("nan")}, "not finite"),
    "inf, drawn": ({"temperature": 1.0, "seed": 1}, {7: float("inf")}, "not finite"),
    "no seed": ({"temperature": 1e-40, "seed": None}, {}, "needs SamplingParams.seed"),
    "schema made": ({"schema": "{}", "ignore_eos": False}, {}, "broken when made"),
    "schema asked": ({"schema": "{}", "ignore_eos": False}, {}, "broken when asked"),
    "schema told": ({"schema": "{}", "ignore_eos": False}, {}, "broken when told"),
    "no room": ({}, {}, "room reserved"),
}


@pytest.mark.parametrize("name", CULPRITS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_one_sequence_does_wrong_ends_it_alone(name: str, place: int) -> None:
    sampling, logits, words = CULPRITS[name]
    right = reference("llama-gqa").tokens
    assert 7 not in right[:-1]
    model = Poisoned(loaded("llama-gqa"), logits, name.removeprefix("schema "))
    with fleet(model, 2) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        made.prefill(1, placement, prompt_ids(PROMPT))
        others = [replace(state(1, placement, PROMPT, right[0], NEW - 1))]
        twin = made.place(2, ("w0", ROOM))
        made.prefill(2, twin, prompt_ids(PROMPT))
        others.append(state(2, twin, PROMPT, right[0], NEW - 1))
        room = PROMPT if name == "no room" else ROOM
        bad = made.place(3, ("w1", 40), ("w0", room - 40))
        made.prefill(3, bad, prompt_ids(PROMPT))
        others.insert(place, state(3, bad, PROMPT, 7, NEW - 1, **sampling))
        result, _ = made.decode("w0", others, 100)
        assert result.finished == {1: "length", 2: "length", 3: "error"}
        assert {1: right[1:], 2: right[1:], 3: []} == result.tokens
        assert list(result.errors) == [3]
        assert words in str(result.errors[3])
        again, _ = made.decode("w0", [others[place]], 100)  # alone: no other sequence is left
        assert (again.finished, again.tokens) == ({3: "error"}, {3: []})


def test_a_first_token_that_cannot_be_drawn_is_the_error_of_its_chunk() -> None:
    model = Poisoned(loaded("llama-gqa"), {prompt_ids(PROMPT)[-1]: float("nan")})
    with fleet(model, 2) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        with pytest.raises(ModelError, match=f"position {PROMPT} are not finite"):
            made.prefill(1, placement, prompt_ids(PROMPT))


def test_what_users_wrote_is_in_no_repr_of_what_tasks_and_messages_carry() -> None:
    sampling = SamplingParams(schema='{"const": "secret"}')
    carried = [
        PrefillChunk(Gang("e", 1, "n", 0, "w", ()), 1, (), 0, (4711,), sampling, (4711,)),
        SequenceState(1, (), 5, 4711, 9, sampling, array("i", [4711]), (4711,)),
        WindowResult({1: [4711]}, {}, 1, 0.0),
    ]
    for one in carried:
        assert "4711" not in repr(one)
        assert "secret" not in repr(one)
