"""Late messages about chunks, windows, gangs, moves and files that were given up change nothing."""

from __future__ import annotations

import copy
import random
from array import array
from typing import Any

import pytest
from _examples import examples
from _simulated import Simulated, cluster_of, expected, settle

from distkv_dask.errors import GangAbortedError
from distkv_dask.gang import Exchanged, WindowResult
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.names import Transfer
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.lifecycle.events import Event

ABOUT_NUMBERS = (
    did.ChunkStarted, did.ChunkDone, did.Prefilled, did.WindowStarted, did.WindowDone, did.GangFailed, did.Expected,
    did.Sent, did.Relocated, did.Stored,
)  # fmt: skip
"""Messages that name their subject by a number that is never used again."""
NOTHING_YET = 10**6
"""An unused number."""


def facts(cluster: Simulated) -> Any:
    """What must not change: states and tokens of requests, placements, and work in progress."""
    life = cluster.life
    requests = {number: (one.state.label, list(one.generated), one.lost) for number, one in life.requests.items()}
    chains = {
        home: (chain.epoch, list(chain.outstanding), list(chain.sequences)) for home, chain in life.chains.items()
    }
    moves = {number: one.phase for number, one in life.moves.under_way.items()}
    return copy.deepcopy((requests, chains, moves, life.ledger.epoch, list(life.ledger.moves)))


def repeat(cluster: Simulated, event: Event) -> None:
    """Handle an event again."""
    before = facts(cluster)
    commands = cluster.machine.handle(event, cluster.now)
    assert facts(cluster) == before, event
    if isinstance(event, did.Stored):  # files that nobody needs are deleted
        commands = [one for one in commands if not isinstance(one, to.Discard)]
    assert not commands, event


@pytest.mark.parametrize("seed", range(examples(30)))
def test_what_was_heard_once_changes_nothing_when_it_is_heard_again(seed: int) -> None:
    rng = random.Random(seed)
    cluster = cluster_of(seed, *(rng.randint(8, 20) for _ in range(3)))
    heard: list[Event] = []
    handle = cluster.machine.handle

    def listening(event: Event, now: float) -> Any:
        if isinstance(event, ABOUT_NUMBERS) and not isinstance(event, did.GangFailed):
            heard.append(event)
        return handle(event, now)

    cluster.machine.handle = listening  # type: ignore[method-assign]
    for number in range(8):
        prompt = array("i", range(100 * number, 100 * number + rng.randint(1, 40)))
        cluster.submit(number, prompt, SamplingParams(max_new_tokens=12, priority=rng.randrange(2)))
    for _ in range(60):
        cluster.happen(rng.choice(["step"] * 8 + ["fail", "move", "move", "drain", "stay"]))
        if heard:
            cluster.machine.handle = handle  # type: ignore[method-assign]
            repeat(cluster, rng.choice(heard))
            cluster.machine.handle = listening  # type: ignore[method-assign]
    for worker in list(cluster.pools):
        cluster.drain(worker, False)
    settle(cluster)
    assert {number: cluster.tokens[number] for number in range(8)} == {
        number: expected(number, 12) for number in range(8)
    }


@pytest.mark.parametrize(
    "event",
    [
        did.ChunkStarted("w0", NOTHING_YET),
        did.ChunkDone("w0", 0, NOTHING_YET, Exchanged()),
        did.ChunkDone("w0", NOTHING_YET, NOTHING_YET, Exchanged()),
        did.Prefilled("w0", 0, NOTHING_YET, 5, None, Exchanged()),
        did.WindowStarted("w0", NOTHING_YET),
        did.WindowStarted("gone", 0),
        did.WindowDone("w0", NOTHING_YET, 0, WindowResult({0: [7]}, {0: "stop"}, 1, 0.1), ()),
        did.WindowDone("w0", 0, 99, WindowResult({0: [7]}, {0: "stop"}, 1, 0.1), ()),
        did.WindowDone("gone", 0, 0, WindowResult({0: [7]}, {0: "stop"}, 1, 0.1), ()),
        did.GangFailed("w0", NOTHING_YET, GangAbortedError("why")),
        did.Retired("w0", NOTHING_YET),
        did.Retired("w0", 0),
        did.Expected("w0", Transfer("move", NOTHING_YET)),
        did.Sent("w0", Transfer("move", NOTHING_YET), "why"),
        did.Relocated("w0", NOTHING_YET),
        did.Stored("w0", Transfer("save", NOTHING_YET)),
        did.Stored("w0", Transfer("save", 0)),
        did.Stored("w0", Transfer("spill", -NOTHING_YET)),
        did.Fetched("w0", NOTHING_YET),
        did.Fetched("w0", 0),
    ],
    ids=lambda event: f"{type(event).__name__}-{event.worker}",
)
@pytest.mark.parametrize("state", ["prefill", "decode"])
def test_messages_about_nothing_that_is_known_change_nothing(event: did.FromWorker, state: str) -> None:
    cluster = cluster_of(0, 30, 30)
    cluster.submit(0, array("i", range(30)), SamplingParams(max_new_tokens=9))
    while cluster.life.requests[0].state.label != state:
        assert cluster.step()
    repeat(cluster, event)
    settle(cluster)
    assert cluster.tokens[0] == expected(0, 9)
