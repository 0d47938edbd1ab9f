"""Random runs of the simulated cluster, checked against a model that knows only messages and users.

``python tests/scheduler/_random_runs.py 3000`` prints a digest of all tokens, ends and final ledgers, and the number of
events of each kind. A change of the state machine that changes no behaviour leaves the digest as it was.
"""

from __future__ import annotations

import hashlib
import random
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from _simulated import BLOCK, Simulated, assert_nothing_left, cluster_of, expected, settle

from distkv_dask.errors import CapacityError, InvalidRequestError, WorkerLostError
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.lifecycle.losses import MAX_LOSSES
from distkv_dask.scheduler.policies import POLICIES

HAPPENINGS = {
    "ask": 10, "ingest": 4, "release": 1, "cancel": 1, "step": 40, "move": 6, "lose": 1, "join": 2, "fail": 1,
    "fault": 1, "poison": 1, "drain": 1, "stay": 2, "late": 1, "rot": 1,
}  # fmt: skip
"""Events and their weights."""


@dataclass
class Users:
    """The users' requests, which are all that the model knows besides messages to workers."""

    cluster: Simulated
    rng: random.Random
    wanted: dict[int, int] = field(default_factory=dict)
    """Maximum answer tokens of each request."""
    documents: dict[int, array[int]] = field(default_factory=dict)
    """Documents that were ingested and not released, with their tokens."""
    cancelled: set[int] = field(default_factory=set)
    happened: Counter[str] = field(default_factory=Counter)
    numbers: int = 0

    def do(self, what: str) -> None:
        """Trigger an event; the cluster may refuse it."""
        self.happened[what] += 1
        try:
            match what:
                case "ask":
                    self._ask()
                case "ingest":
                    self._ingest()
                case "release" if self.documents:
                    self.release(self.rng.choice(list(self.documents)))
                case "cancel" if self.wanted:
                    number = self.rng.choice(list(self.wanted))
                    self.cancelled.add(number)
                    self.cluster.stop(number)
                case _:
                    self.cluster.happen(what)
        except (CapacityError, InvalidRequestError):
            self.happened["refused"] += 1

    def release(self, number: int) -> None:
        """Release a document."""
        del self.documents[number]
        self.cluster.stop(number)

    def _number(self) -> int:
        self.numbers += 1
        return self.numbers

    def _ask(self) -> None:
        number, about = self._number(), None
        prompt, new = array("i"), self.rng.choice([1, 4, 12, 40])
        if self.documents and self.rng.random() < 0.7:
            about = self.rng.choice(list(self.documents))
            prompt = self.documents[about][: self.rng.randint(1, 60)]
        prompt = prompt + array("i", [1000 + number] * self.rng.randint(1, 30))
        sampling = SamplingParams(max_new_tokens=new, priority=self.rng.choice([0, 0, 1]))
        self.cluster.submit(number, prompt, sampling, document=about if self.rng.random() < 0.5 else None)
        self.wanted[number] = new

    def _ingest(self) -> None:
        number = self._number()
        tokens = array("i", range(100 * number, 100 * number + self.rng.randint(1, 50)))
        self.cluster.ingest(number, tokens)
        self.documents[number] = tokens


@dataclass(frozen=True)
class Ending:
    """The results of a run."""

    tokens: dict[int, tuple[int, ...]]
    ends: dict[int, str]
    ledger: tuple[object, ...]
    happened: Counter[str]


def run(seed: int, events: int = 90) -> Ending:
    """One run; raises AssertionError if its results differ from the model's."""
    rng = random.Random(seed)
    policy, cached, lends = rng.choice(sorted(POLICIES)), rng.random() < 0.7, rng.choice([1.0, 1.0, 0.5])
    sizes = [rng.randint(8, 24) for _ in range(rng.randint(1, 4))]
    cluster = cluster_of(seed, *sizes, policy=policy, prefix_cache=cached, lend_limit=lends)
    cluster.refusing = rng.random() < 0.5
    users = Users(cluster, rng)
    for what in rng.choices(list(HAPPENINGS), list(HAPPENINGS.values()), k=events):
        users.do(what)
    for worker in list(cluster.pools):
        cluster.drain(worker, False)
    settle(cluster)
    check_answers(users)
    check_ledger_by_messages(users)
    ledger = final_ledger(cluster)
    for number in list(users.documents):
        users.release(number)
    settle(cluster)
    assert_nothing_left(cluster)
    tokens = {number: tuple(cluster.tokens[number]) for number in sorted(users.wanted)}
    ends = {number: cluster.ends[number][0] for number in sorted(users.wanted)}
    return Ending(tokens, ends, ledger, users.happened + Counter(ends.values()))


def check_answers(users: Users) -> None:
    """Check that each request has ended once, with all its tokens, or the first ones and a reason known to users."""
    cluster = users.cluster
    for number, new in users.wanted.items():
        reason, error = cluster.ends[number]
        right = expected(number, new)
        assert cluster.tokens[number] == right[: len(cluster.tokens[number])], "tokens lost, doubled or out of order"
        assert reason not in ("stop", "length") or cluster.tokens[number] == right
        assert reason != "cancelled" or number in users.cancelled
        assert (reason == "error") == (error is not None)
        assert not isinstance(error, WorkerLostError) or users.happened["lose"] > MAX_LOSSES
        assert not isinstance(error, InvalidRequestError) or number in cluster.poisoned


def check_ledger_by_messages(users: Users) -> None:
    """Check that the ledger agrees with the pools that result from the messages to workers.

    A pool results here from Reserve, Expect, Free and Release; a block has the tokens that were computed, copied or
    read into it. Blocks of documents that users have not released are held; all others are cached.
    """
    cluster, ledger = users.cluster, users.cluster.life.ledger
    where: dict[int, dict[int, str]] = {}
    for worker, pool in cluster.pools.items():
        for number, table in pool.items():
            if number not in users.documents:
                continue
            for block, there in table.items():
                assert block not in where.setdefault(number, {}), "a block lies on two workers"
                where[number][block] = worker
                assert there == tuple(users.documents[number][block * BLOCK : (block + 1) * BLOCK])
    assert where.keys() == {number for number, account in ledger.sequences.items() if account.own}
    owed: Counter[tuple[str, str]] = Counter()
    for number, lies in where.items():
        assert [*sorted(lies)] == [*range(len(users.documents[number]) // BLOCK)], "a document is not whole"
        home = lies[max(lies)]
        owed.update((home, worker) for worker in lies.values() if worker != home)
        for span in ledger.sequences[number].placement:
            assert {lies[block] for block in range(span.start // BLOCK, span.stop // BLOCK)} <= {span.worker}
    assert ledger.owes.by_pair() == owed
    for worker, account in ledger.workers.items():
        held = Counter(number for number, lies in where.items() for one in lies.values() if one == worker)
        assert account.held == held
        assert account.used == account.documents == held.total()
        assert account.lent == sum(count for (_, creditor), count in owed.items() if creditor == worker)
        assert account.cached == sum(map(len, cluster.pools[worker].values())) - held.total()
        assert account.used + account.cached <= account.capacity


def final_ledger(cluster: Simulated) -> tuple[object, ...]:
    """The ledger's records of workers and documents, in an order that does not depend on their history."""
    ledger = cluster.life.ledger
    workers = sorted((one.worker, one.capacity, one.used, one.cached, one.lent) for one in ledger.workers.values())
    documents = sorted(
        (number, tuple((span.worker, span.start, span.stop) for span in account.placement), account.length)
        for number, account in ledger.sequences.items()
    )
    return tuple(workers), tuple(documents)


def main() -> None:
    """Print how many runs ended correctly, their events, and the digest of their results."""
    first, count = (0, int(sys.argv[1])) if len(sys.argv) < 3 else (int(sys.argv[1]), int(sys.argv[2]))
    digest, happened = hashlib.sha256(), Counter[str]()
    for seed in range(first, first + count):
        ending = run(seed)
        happened += ending.happened
        digest.update(repr((seed, ending.tokens, ending.ends, ending.ledger)).encode())
    print(f"{count} runs from seed {first}: {dict(sorted(happened.items()))}")
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
