"""Kinds of requests: what tells them apart, and what none of them can be."""

from __future__ import annotations

import ast
import importlib
import math
from array import array
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from _simulated import cluster_of

import distkv_dask.scheduler.records as records
from distkv_dask.messages.client_calls import Generate, Ingest, Load, Save, Submission
from distkv_dask.messages.names import Saved
from distkv_dask.placement import Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.lifecycle.arrivals import arrived
from distkv_dask.scheduler.records import kinds
from distkv_dask.scheduler.records.kinds import Answer, CachedPrefix, Demand, Document
from distkv_dask.scheduler.records.request import Asked, Request, Turn
from distkv_dask.scheduler.records.reuse import Parent, Reuse
from distkv_dask.scheduler.records.states import Stored, Waiting

RECORDS = Path(records.__file__).parent
LISTS = "__init__", "machine_state"
"""Modules without a record of their own: the second names all others."""

PROMPT = array("i", range(10))
PLACE = Saved("/folder")

FEW = SamplingParams(max_new_tokens=5)
SCORED = replace(FEW, prompt_logprobs=1)


def generate(sampling: SamplingParams = FEW, **how: Any) -> Generate:
    return Generate(1, PROMPT, sampling, **how)


ARRIVALS: dict[str, tuple[Submission, type, str, int]] = {
    "a request": (generate(), Answer, "plain", 14),
    "a streamed choice": (generate(streamed=True, choices=((1,), (2, 3))), Answer, "plain", 14),
    "a question": (generate(document=0), Answer, "named", 14),
    "a turn of a chat": (generate(document=0, keeps=True), Answer, "named kept", 14),
    "the first turn of a chat": (generate(keeps=True), Answer, "kept", 14),
    "a question with scores": (generate(SCORED, document=0), Answer, "named alone", 14),
    "a request with scores": (generate(SCORED), Answer, "alone", 14),
    "a mean": (generate(SamplingParams(embed="mean", max_new_tokens=1)), Answer, "alone", 10),
    "a last state": (generate(SamplingParams(embed="last", max_new_tokens=1)), Answer, "plain", 10),
    "a document": (Ingest(1, PROMPT), Document, "document", 8),
    "a document in files": (Load(1, PROMPT, PLACE), Document, "document saved", 8),
    "a save": (Save(1, 0, PLACE), kinds.Save, "named save", 0),
}
"""What clients submit: the kind of the request, what is true of it, and the tokens that need room (blocks have 4)."""


def words(one: Request) -> set[str]:
    """What is true of a request."""
    truths = {
        "plain": one.is_plain,
        "named": one.parent == Parent(0),
        "alone": one.alone,
        "kept": one.demand is not None and not one.is_document,
        "document": one.is_document,
        "cached": one.is_cached,
        "save": one.is_save,
        "saved": one.saved is not None,
        "announced": one.is_announced,
        "released": one.is_released,
    }
    return {word for word, holds in truths.items() if holds}


@pytest.mark.parametrize("what", ARRIVALS)
def test_what_a_client_submits_becomes_a_request_of_its_kind(what: str) -> None:
    submission, kind, expected, tokens = ARRIVALS[what]
    one = arrived(cluster_of(0, 10).life, submission)
    assert type(one.kind) is kind
    assert words(one) == {*expected.split()}
    assert one.tokens == tokens
    assert isinstance(one.state, Waiting)
    assert (one.generated or ()) == ()


def test_each_kind_gets_what_its_client_said_of_it() -> None:
    life = cluster_of(0, 10).life
    said = arrived(life, generate(streamed=True, choices=((1,), (2, 3)))).answer
    assert (said.streamed, said.choices, said.pooled) == (True, ((1,), (2, 3)), None)
    pooled = {how: arrived(life, generate(SamplingParams(embed=how))).answer.pooled for how in ("mean", "last")}
    assert pooled == {"mean": 0, "last": len(PROMPT) - 1}
    assert arrived(life, Ingest(1, PROMPT, "report")).kind == Document("report")
    assert arrived(life, Load(1, PROMPT, PLACE, "report")).saved == PLACE
    assert arrived(life, Save(1, 0, PLACE)).kind == kinds.Save(PLACE)


def test_the_shared_part_of_a_cached_sequence_is_a_stored_document_that_no_client_needs() -> None:
    one = Request.of_cached(3, 2, 0.5)
    assert words(one) == {"document", "cached", "announced", "released"}
    assert isinstance(one.state, Stored)
    assert (one.document, one.tokens, one.borrows) == (2, 0, False)
    assert Request.of_cached(3, None, 0.5).document is None


OWN = {
    "streamed": {Answer}, "choices": {Answer}, "generated": {Answer}, "speculated": {Answer}, "decoding": {Answer},
    "pooled": {Answer}, "name": {Document}, "announced": {Document}, "demand": {Answer, Document, CachedPrefix},
    "to": {kinds.Save},
}  # fmt: skip
"""The kinds that have each of their fields."""

KINDS: list[kinds.Kind] = [Answer(), Document(), CachedPrefix(), kinds.Save(PLACE)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda one: type(one).__name__)
def test_a_kind_has_nothing_that_only_others_have(kind: kinds.Kind) -> None:
    assert {one.name for one in fields(kind)} == {name for name, of in OWN.items() if type(kind) in of}
    for name, of in OWN.items():
        if type(kind) not in of:
            with pytest.raises((AttributeError, TypeError)):
                setattr(kind, name, None)
            with pytest.raises(TypeError):
                type(kind)(**{name: None})


def test_what_is_no_request_cannot_be_built() -> None:
    with pytest.raises(TypeError, match="demand"):
        CachedPrefix(demand=Demand())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="to"):
        kinds.Save()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="number"):
        Parent(borrowed=True)  # type: ignore[call-arg]
    with pytest.raises(AssertionError):
        Request(1, PROMPT, Asked(0.0), Document()).answer  # noqa: B018


def test_what_a_client_asked_for_does_not_change() -> None:
    one = Request(1, PROMPT, Asked(0.0), parent=Parent(0))
    with pytest.raises(FrozenInstanceError):
        one.asked.sampling = FEW  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        one.parent.borrowed = True  # type: ignore[misc, union-attr]


def test_a_request_that_borrows_is_still_plain_and_one_that_names_a_document_is_not() -> None:
    one = Request(1, PROMPT, Asked(0.0))
    assert (one.is_plain, one.document, one.borrows) == (True, None, False)
    one.borrow(7)
    assert (one.is_plain, one.document, one.borrows) == (True, 7, True)
    one.parent = Parent(7)
    assert (one.is_plain, one.document, one.borrows) == (False, 7, False)


def test_an_answer_that_is_kept_becomes_a_document_with_all_who_wait_for_it() -> None:
    demand = Demand(dependents={5}, awaited={5: 0.5})
    one = Request(1, PROMPT, Asked(0.0, FEW), Answer(streamed=True, demand=demand, generated=[90, 91, 92]), alone=True)
    assert one.tokens == len(PROMPT) + 4
    one.become_document(12)
    assert list(one.prompt) == [*PROMPT, 90, 91]
    assert one.kind == Document(announced=True, demand=demand)
    assert one.demand is demand
    assert words(one) == {"document", "announced"}
    assert (one.tokens, one.known_tokens, list(one.generated)) == (12, 12, [])


def test_an_answer_that_is_not_kept_never_becomes_a_document() -> None:
    one = Request(1, PROMPT, Asked(0.0), Answer(generated=[90]))
    with pytest.raises(AssertionError):
        one.become_document(8)
    assert isinstance(one.kind, Answer)
    assert one.prompt == PROMPT


def test_no_other_module_gives_a_request_another_kind() -> None:
    sources = RECORDS.parent.glob("*/*.py")
    assigned = {
        (source.name, ast.unparse(target))
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        for target in (node.targets if isinstance(node, ast.Assign) else ())
        for target in getattr(target, "elts", [target])
        if isinstance(target, ast.Attribute) and target.attr == "kind"
    }
    assert assigned == {("request.py", "self.kind"), ("copies.py", "extent.kind")}


@pytest.mark.parametrize(
    ("behind", "rank", "taken"),
    [(-math.inf, 3.0, 3.0), (2.0, 3.0, 3.0), (3.0, 3.0, math.nextafter(3, 4)), (5.0, 3.0, math.nextafter(5, 6))],
)
def test_an_evicted_document_does_not_return_before_the_request_that_got_its_room(
    behind: float, rank: float, taken: float
) -> None:
    turn = Turn(behind=behind)
    turn.take(rank)
    assert turn.rank == taken


def test_what_was_given_to_others_was_computed_and_not_spared() -> None:
    assert Reuse(shared=12, restored=8).spared == 20
    assert Reuse(shared=12, given=(Span("a", 4, 8), Span("b", 8, 12))).spared == 4


@pytest.mark.parametrize("name", sorted(one.stem for one in RECORDS.glob("*.py") if one.stem not in LISTS))
def test_no_record_has_many_fields_or_more_than_two_flags(name: str) -> None:
    module = importlib.import_module(f"{records.__name__}.{name}")
    found = [one for one in vars(module).values() if is_dataclass(one) and one.__module__ == module.__name__]
    for one in found:
        assert len(fields(one)) <= 15, one
        assert sum(field.type == "bool" for field in fields(one)) <= 2, one
