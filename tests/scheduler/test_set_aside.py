"""Requests that cannot run now let others pass: too large for the workers left, or without their document or folder."""

from __future__ import annotations

from array import array

import pytest
from _examples import examples
from _simulated import BLOCK, Simulated, assert_nothing_left, cluster_of, expected, finish
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import CapacityError
from distkv_dask.messages.names import Saved
from distkv_dask.placement import Endpoint
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.costs.presets import PRESET
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.stalls import aside
from distkv_dask.scheduler.policies import POLICIES, policy_named
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.local_only import LocalOnly

SHORT = [1, 2, 3, 4]
LARGE, SMALL = 96, 32
"""Blocks of workers: three have room for more than any two, and the large one for more than a small one."""


def submit(cluster: Simulated, number: int, tokens: int, new: int = 5, document: int | None = None) -> None:
    prompt = array("i", range(1000 * number, 1000 * number + tokens))
    if document is not None:
        prompt = cluster.life.requests[document].prompt + prompt
    sampling = SamplingParams(max_new_tokens=new)
    cluster.submit(number, prompt, sampling, document=document)


def tick(cluster: Simulated, seconds: float = 1.0) -> None:
    cluster.now += seconds
    cluster.tick()
    finish(cluster)


def first(policy: type[Policy]) -> int:
    """Blocks of the worker that the largest requests need."""
    return LARGE if issubclass(policy, LocalOnly) else SMALL


@pytest.fixture(params=sorted(POLICIES))
def cluster(request: pytest.FixtureRequest) -> Simulated:
    """Three workers under each policy."""
    return cluster_of(3, first(POLICIES[request.param]), SMALL, SMALL, policy=request.param)


def largest(cluster: Simulated) -> int:
    """Tokens of the largest request for which there is room."""
    return cluster.life.policy.limit(cluster.life.ledger) * BLOCK


def test_a_request_too_large_for_the_workers_left_lets_others_pass_and_runs_when_one_comes(cluster: Simulated) -> None:
    tokens = largest(cluster) - 3
    cluster.lose_worker("w0")
    submit(cluster, 0, tokens - 10, 11)
    for number in SHORT:
        submit(cluster, number, 20)
    assert "blocks" in aside(cluster.life, cluster.life.requests[0])
    finish(cluster)
    assert {number: cluster.tokens[number] for number in SHORT} == {number: expected(number, 5) for number in SHORT}
    assert 0 not in cluster.ends
    cluster.add_worker(first(type(cluster.life.policy)))
    finish(cluster)
    assert cluster.tokens[0] == expected(0, 11)
    assert_nothing_left(cluster)


def test_one_that_lost_its_room_lets_others_pass_and_is_refused_when_its_limit_ends(cluster: Simulated) -> None:
    tokens = largest(cluster) - 3
    submit(cluster, 0, tokens - 20, 21)
    for number in SHORT:
        submit(cluster, number, 20)
    while cluster.life.requests[0].state.label != "decode":
        assert cluster.step()
    cluster.lose_worker("w0")
    finish(cluster)
    assert sorted(cluster.ends) == SHORT
    tick(cluster)
    submit(cluster, 5, 20)
    tick(cluster, cluster.life.config.timeout_open - 1)
    assert cluster.ends[5] == ("length", None)
    assert 0 not in cluster.ends
    tick(cluster, 2)
    reason, error = cluster.ends[0]
    assert reason == "error"
    assert isinstance(error, CapacityError)
    assert "lost blocks with worker w0" in str(error)
    assert_nothing_left(cluster)


def test_one_that_only_fits_with_a_worker_that_is_retired_lets_others_pass(cluster: Simulated) -> None:
    tokens = largest(cluster) - 3
    cluster.drain("w0")
    submit(cluster, 0, tokens - 10, 11)
    for number in SHORT:
        submit(cluster, number, 20)
    finish(cluster)
    assert sorted(cluster.ends) == SHORT
    cluster.drain("w0", False)
    finish(cluster)
    assert cluster.tokens[0] == expected(0, 11)


def test_a_question_whose_document_cannot_leave_a_retired_worker_lets_others_pass() -> None:
    cluster = cluster_of(3, 20, 10)
    cluster.ingest(0, array("i", range(64)))  # 16 blocks: no room for it on the other worker
    finish(cluster)
    cluster.drain("w0")
    submit(cluster, 9, 5, document=0)
    for number in SHORT:
        submit(cluster, number, 20)
    assert "document" in aside(cluster.life, cluster.life.requests[9])
    finish(cluster)
    assert sorted(cluster.ends) == [0, *SHORT]
    cluster.drain("w0", False)
    finish(cluster)
    assert cluster.tokens[9] == expected(9, 5)
    assert cluster.reused[9] == 64


def test_what_needs_room_that_a_silent_folder_holds_lets_others_pass_until_it_answers() -> None:
    cluster = cluster_of(3, 20)
    cluster.ingest(0, array("i", range(60)))
    finish(cluster)
    cluster.save(8, 0, Saved("folder", tag="x"))
    (store,) = cluster.files
    cluster.files = []
    submit(cluster, 9, 40)  # needs the document's room, and the document is being saved
    for number in SHORT:
        submit(cluster, number, 10)
    finish(cluster)
    assert not set(cluster.ends) & {*SHORT}, "the folder may answer any moment"
    tick(cluster, cluster.life.config.timeout_receive + 1)
    tick(cluster)
    assert set(cluster.ends) >= {*SHORT}
    assert 9 not in cluster.ends
    cluster.files = [store]
    for _ in range(3):
        tick(cluster)
    assert cluster.tokens[9] == expected(9, 5)


def test_a_document_that_nobody_waits_for_any_more_leaves_the_queue() -> None:
    cluster = cluster_of(3, 20, 20)
    cluster.ingest(0, array("i", range(100)))
    finish(cluster)
    cluster.lose_worker("w0")
    submit(cluster, 1, 5, document=0)
    assert cluster.life.requests[0].state.label == "waiting"
    assert aside(cluster.life, cluster.life.requests[1]), "so is who asks it"
    cluster.stop(1)
    assert cluster.life.requests[0].state.label == "dropped"
    submit(cluster, 2, 5, document=0)
    cluster.stop(0)
    cluster.stop(2)
    assert_nothing_left(cluster)


def test_two_documents_do_not_take_turns_for_questions_that_cannot_run() -> None:
    cluster = cluster_of(3, 20, 20)
    for document in (0, 1):
        cluster.ingest(document, array("i", range(1000 * document, 1000 * document + 44)))
    finish(cluster)
    cluster.lose_worker("w0")
    for number in (2, 3):
        submit(cluster, number, 90, document=number - 2)  # more than the remaining worker has
    finish(cluster)  # it ends
    cluster.add_worker(40)
    finish(cluster)
    assert [cluster.tokens[number] for number in (2, 3)] == [expected(number, 5) for number in (2, 3)]


workers = st.lists(
    st.tuples(st.integers(1, 20), st.sampled_from(["a", "b"]), st.booleans(), st.integers(0, 4)), min_size=1, max_size=5
)


@settings(max_examples=examples(300), deadline=None)
@given(st.sampled_from(sorted(POLICIES)), workers, st.sampled_from([1.0, 0.5, 0.0]), st.integers(1, 100))
def test_the_limit_is_what_a_policy_has_room_for_when_there_is_no_other_request(
    policy: str, sizes: list[tuple[int, str, bool, int]], lend_limit: float, blocks: int
) -> None:
    ledger, chosen = Ledger(BLOCK, 4), policy_named(policy, PRESET)
    for at, (capacity, host, decodes, leaving) in enumerate(sizes):
        lends = int(capacity * lend_limit) if decodes else capacity
        ledger.add_worker(Endpoint(f"w{at}", host, 1), capacity, lend_limit=lends, can_decode=decodes)
        ledger.retire_worker(f"w{at}", not leaving)
    placement = chosen.place(ledger, Ask(0, 1, blocks * BLOCK))
    assert (placement is not None) == (blocks <= chosen.limit(ledger))
