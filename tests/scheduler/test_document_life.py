"""Documents in the lifecycle: shared, evicted, lost and released in any order, with nothing left in the end."""

from __future__ import annotations

from array import array

import pytest
from _examples import examples
from _simulated import BLOCK, Simulated, assert_nothing_left, cluster_of, expected, finish, mishaps, settle
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import CapacityError, InvalidRequestError, WorkerLostError
from distkv_dask.messages.client_calls import Generate
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.lifecycle.losses import MAX_LOSSES


def prompt(document: int, tokens: int, *more: int) -> array[int]:
    return array("i", [*range(100 * document, 100 * document + tokens), *more])


def stored(capacities: list[int], tokens: int = 18) -> Simulated:
    """A cluster that holds document 0."""
    cluster = cluster_of(0, *capacities)
    cluster.ingest(0, prompt(0, tokens))
    finish(cluster)
    assert cluster.ends.pop(0) == ("stop", None)
    return cluster


def ask(
    cluster: Simulated, number: int, document: int = 0, tokens: int = 18, new: int = 5, keeps: bool = False
) -> None:
    sampling = SamplingParams(max_new_tokens=new)
    asked = prompt(document, tokens, 7, number)
    cluster.submit(number, asked, sampling, document=document, keeps=keeps)


def used(cluster: Simulated) -> int:
    return sum(account.used for account in cluster.life.ledger.workers.values())


def test_questions_share_the_documents_blocks_and_compute_only_what_is_theirs() -> None:
    cluster = stored([20, 20])
    assert used(cluster) == 4  # whole blocks: 16 of 18 tokens
    for number in (1, 2, 3):
        ask(cluster, number)
    spans = [span for chain in cluster.chunks for chunk in chain for span in chunk.placement]
    assert used(cluster) == 4 + 2 * sum(span.document is None for span in spans)
    finish(cluster)
    assert [cluster.tokens[number] for number in (1, 2, 3)] == [expected(number, 5) for number in (1, 2, 3)]
    assert [cluster.reused[number] for number in (1, 2, 3)] == [16] * 3
    assert used(cluster) == 4
    cluster.stop(0)
    assert used(cluster) == 0
    assert not any(cluster.pools.values())


def test_a_document_that_is_released_early_is_freed_with_its_last_question() -> None:
    cluster = stored([20])
    ask(cluster, 1)
    ask(cluster, 2, new=20)
    cluster.stop(0)
    with pytest.raises(InvalidRequestError, match="released"):
        ask(cluster, 3)
    finish(cluster)
    assert cluster.tokens[2] == expected(2, 20)
    assert_nothing_left(cluster)


def test_questions_of_one_document_decode_at_one_home() -> None:
    cluster = stored([60, 60, 60])
    for number in range(1, 4):
        ask(cluster, number, new=30)
    homes = set()
    while cluster.step():
        homes |= {home for home, batch in cluster.batches.items() if batch}
    assert len(homes) == 1


def test_questions_of_one_document_are_computed_together_before_they_decode() -> None:
    cluster = stored([60])
    for number in range(1, 5):
        ask(cluster, number, new=10)
    assert len(cluster.chunks) == 4
    for chain in list(cluster.chunks):
        cluster.run_chunk(chain[0])
    assert len(cluster.windows["w0"]) == 1
    assert len(cluster.batches["w0"]) == 4


def test_the_least_recently_used_document_makes_room_and_comes_back_when_it_is_asked() -> None:
    cluster = stored([20])
    for number in (1, 2):
        cluster.ingest(number, prompt(number, 20))
        finish(cluster)
        cluster.ends.pop(number)
    ask(cluster, 3, document=0)
    finish(cluster)
    cluster.submit(4, prompt(9, 20), SamplingParams(max_new_tokens=9))
    finish(cluster)
    states = {number: cluster.life.requests[number].state.label for number in range(3)}
    assert states == {0: "document", 1: "dropped", 2: "document"}
    ask(cluster, 5, document=1)
    finish(cluster)
    assert cluster.tokens[5] == expected(5, 5)
    assert cluster.reused[5] == 16  # the question begins with 18 of its 20 tokens
    assert cluster.life.requests[1].state.label == "document"


def test_a_document_that_made_way_comes_back_only_after_the_one_that_it_made_way_for() -> None:
    cluster = stored([10])
    cluster.ingest(1, prompt(1, 18))
    finish(cluster)
    sampling = SamplingParams(max_new_tokens=12)
    asked = [Generate(2 + one, prompt(one, 18, 7), sampling, document=one) for one in (0, 1)]
    cluster.send(*asked)  # at the same time: neither fits while both documents are stored
    finish(cluster)
    assert [cluster.tokens[number] for number in (2, 3)] == [expected(number, 12) for number in (2, 3)]
    assert [cluster.reused[number] for number in (2, 3)] == [16, 16]


def test_a_question_whose_document_leaves_no_room_for_it_is_answered_without_sharing() -> None:
    cluster = cluster_of(0, 5)
    cluster.ingest(0, prompt(0, 20))
    finish(cluster)
    cluster.ends.pop(0)
    sampling = SamplingParams(max_new_tokens=1)
    cluster.submit(1, prompt(0, 18, 1), sampling, document=0)
    finish(cluster)
    assert cluster.ends[1] == ("length", None)


def test_a_document_that_lost_blocks_is_computed_anew_for_who_asks_next() -> None:
    cluster = stored([3, 4, 5], tokens=40)  # no room for lost blocks before a replacement comes
    cluster.lose_worker()
    assert cluster.life.requests[0].state.label == "dropped"
    cluster.add_worker(9)
    ask(cluster, 1, tokens=40)
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 5)
    assert cluster.reused[1] == 40


def test_a_turn_of_a_chat_shares_the_blocks_of_the_turn_before() -> None:
    cluster = stored([40])
    ask(cluster, 1, keeps=True, new=9)
    finish(cluster)
    assert cluster.ends.pop(1) == ("length", None)
    said = cluster.life.requests[1].prompt
    assert list(said) == [*prompt(0, 18, 7, 1), *expected(1, 9)][: 28 // BLOCK * BLOCK]
    assert used(cluster) == 7
    sampling = SamplingParams(max_new_tokens=5)
    cluster.submit(2, said + array("i", [5, 6]), sampling, document=1, keeps=True)
    finish(cluster)
    assert cluster.reused[2] == 28
    assert cluster.tokens[2] == expected(2, 5)
    for number in (0, 1, 2):  # the oldest first: its blocks are needed by the others
        assert used(cluster) == 8
        cluster.stop(number)
    assert_nothing_left(cluster)


def test_blocks_of_a_document_at_rest_leave_a_worker_that_is_drained() -> None:
    cluster = stored([20, 20])
    (holder,) = {span.worker for span in cluster.life.ledger.sequences[0].placement}
    cluster.drain(holder)
    ask(cluster, 1)  # waits until the document is at rest again
    finish(cluster)
    assert cluster.life.is_drained(holder)
    assert cluster.tokens[1] == expected(1, 5)
    assert cluster.reused[1] == 16


def test_a_request_that_begins_like_a_document_shares_it_unasked_and_never_waits_for_it() -> None:
    cluster = stored([12])
    sampling = SamplingParams(max_new_tokens=5)
    cluster.submit(1, prompt(0, 13, 7, 7, 7, 7, 7), sampling)
    finish(cluster)
    assert cluster.reused[1] == 12
    assert cluster.tokens[1] == expected(1, 5)
    large = SamplingParams(max_new_tokens=25)
    cluster.submit(2, prompt(8, 20), large)  # fits only without the document
    cluster.submit(3, prompt(0, 17), sampling)
    assert cluster.life.requests[0].state.label == "spilling"
    cluster.stop(0)
    finish(cluster)
    assert cluster.reused[3] == 0
    assert cluster.tokens[3] == expected(3, 5)
    assert_nothing_left(cluster)


asked = st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(1, 40), st.booleans())
crowd = st.tuples(st.just(0), st.just(0), st.integers(30, 60), st.just(False))  # evicts documents
events = st.one_of(
    mishaps.filter(bool).map(lambda some: some[0]), st.just("step"), st.just("step"), asked, crowd, st.integers(0, 3)
)


def ingest_all(cluster: Simulated, documents: list[int]) -> set[int]:
    """Ingest documents of these numbers of tokens; returns the ids of those for which there is room."""
    held: set[int] = set()
    for number, tokens in enumerate(documents):
        try:
            cluster.ingest(number, prompt(number, tokens))
            held.add(number)
        except CapacityError:
            pass
    return held


def assert_right_ends(cluster: Simulated, wanted: dict[int, int], happenings: list[object]) -> None:
    """Check that each request has ended, with the right tokens or an error that has a cause."""
    for number, new in wanted.items():
        reason, error = cluster.ends[number]
        right = expected(number, new)
        assert cluster.tokens[number] == right[: len(cluster.tokens[number])]
        if reason in ("stop", "length"):
            assert cluster.tokens[number] == right
        assert (reason == "error") == (error is not None)
        assert not isinstance(error, WorkerLostError) or happenings.count("lose") > MAX_LOSSES


@settings(max_examples=examples(200), deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(8, 20), min_size=1, max_size=4),
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.lists(events, max_size=100),
)
def test_every_question_ends_once_with_right_tokens_and_nothing_is_left_of_documents(
    seed: int, sizes: list[int], documents: list[int], happenings: list[object]
) -> None:
    cluster = cluster_of(seed, *sizes)
    cluster.refusing = True
    wanted: dict[int, int] = {}
    held = ingest_all(cluster, documents)
    for happening in happenings:
        happen(cluster, happening, held, wanted)
    for worker in list(cluster.pools):
        cluster.drain(worker, False)
    settle(cluster)
    assert_right_ends(cluster, wanted, happenings)
    for number in sorted(cluster.life.requests, key=lambda number: cluster.rng.random()):
        assert number not in cluster.life.requests or cluster.life.requests[number].is_document
        cluster.stop(number)
    settle(cluster)
    assert_nothing_left(cluster)


def happen(cluster: Simulated, happening: object, held: set[int], wanted: dict[int, int]) -> None:
    life = cluster.life
    match happening:
        case (document, tokens, new, keeps):
            number = 10 + len(wanted)
            kept = [one for one, live in life.requests.items() if one >= 10 and live.demand and not live.is_cached]
            names = [*held, *kept]
            like = cluster.rng.choice(names) if names else None
            name = like if document else None
            beginning = life.requests[like].prompt if like in life.requests else array("i")
            try:
                sampling = SamplingParams(max_new_tokens=new, priority=new % 3)
                asked = beginning[:tokens] + array("i", [number])
                cluster.submit(number, asked, sampling, document=name, keeps=keeps)
                wanted[number] = new
            except (CapacityError, InvalidRequestError):
                pass
        case int():
            if happening in held:
                held.discard(happening)
                cluster.stop(happening)
        case "cancel":
            if wanted:
                cluster.stop(cluster.rng.choice(sorted(wanted)))
        case str():
            cluster.happen(happening)


def test_a_question_that_shares_nothing_is_answered_although_the_turn_that_it_names_was_cancelled() -> None:
    cluster = cluster_of(0, 10)
    cluster.submit(1, prompt(0, 28), SamplingParams(max_new_tokens=9), keeps=True)
    cluster.submit(2, prompt(0, 20, 7), SamplingParams(max_new_tokens=5, prompt_logprobs=1), document=1)
    assert cluster.life.requests[2].state.label == "waiting"
    cluster.stop(1)
    finish(cluster)
    assert cluster.ends[2] == ("length", None)
    assert cluster.tokens[2] == expected(2, 5)
    assert_nothing_left(cluster)
