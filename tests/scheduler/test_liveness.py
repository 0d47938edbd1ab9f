"""Whatever happens: once faults stop, all requests that fit are answered, none waits in vain, and nothing is left."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

import pytest
from _examples import examples
from _simulated import Simulated, assert_nothing_left, cluster_of, expected, finish

from distkv_dask.errors import CapacityError, InvalidRequestError
from distkv_dask.messages.names import OWN_DISK, Saved
from distkv_dask.placement import Endpoint
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.lifecycle.events import WorkerReady
from distkv_dask.scheduler.lifecycle.stalls import aside
from distkv_dask.scheduler.policies import POLICIES

HAPPENINGS = {
    "submit": 8, "ask": 6, "ingest": 3, "save": 2, "load": 2, "cancel": 3, "release": 2, "step": 40, "tick": 3,
    "lose": 2, "join": 2, "drain": 1, "stay": 1, "fail": 2, "fault": 1, "move": 3, "rot": 1, "late": 1,
}  # fmt: skip
ROUNDS = 100
"""Seconds of the gManager's clock after the last fault within which all requests that fit must be answered."""


@dataclass
class Users:
    """Users of a simulated cluster: their requests, and the documents that they have not released."""

    cluster: Simulated
    rng: random.Random
    wanted: dict[int, int] = field(default_factory=dict)
    documents: set[int] = field(default_factory=set)
    keeping: set[int] = field(default_factory=set)
    saving: dict[int, int] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)
    saved: list[tuple[array[int], Saved]] = field(default_factory=list)
    numbers: int = 0

    def do(self, what: str) -> None:
        cluster = self.cluster
        try:
            match what:
                case "submit" | "ask":
                    self.ask(what == "ask")
                case "ingest":
                    prompt = array("i", range(self.rng.randrange(1000), 10**6))[: self.rng.randint(1, 70)]
                    cluster.ingest(self.number(), prompt)
                    self.documents.add(self.numbers)
                case "load" if self.saved:
                    prompt, where = self.rng.choice(self.saved)
                    cluster.ingest(self.number(), prompt, saved=where)
                    self.documents.add(self.numbers)
                case "save" if held := sorted(self.documents & {*self.held()}):
                    document = self.rng.choice(held)
                    number = self.number()
                    cluster.save(number, document, Saved("folder", tag=f"s{number}"))
                    self.saving[self.numbers] = document
                case "cancel" if running := [n for n in (*self.wanted, *self.saving) if n not in cluster.ends]:
                    self.stop(self.rng.choice(running))
                case "release" if held := self.held():
                    self.stop(self.rng.choice(held))
                case "tick":
                    cluster.now += 1
                    cluster.tick()
                case "join":
                    add_worker(cluster, self.rng)
                case "submit" | "ask" | "load" | "save" | "cancel" | "release":
                    pass
                case _:
                    cluster.happen(what)
        except (CapacityError, InvalidRequestError):
            pass
        self.hear()

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def held(self) -> list[int]:
        """Documents that were stored and not released."""
        ends = self.cluster.ends
        stored = {n for n in self.documents if ends.get(n, ("",))[0] == "stop"}
        kept = {n for n in self.keeping if ends.get(n, ("",))[0] in ("stop", "length")}
        return sorted((stored | kept) - self.stopped)

    def ask(self, about: bool) -> None:
        life, held = self.cluster.life, self.held()
        document = self.rng.choice(held) if about and held else None
        beginning = life.requests[document].prompt if document in life.requests else array("i")
        prompt = beginning[: self.rng.randint(1, 80)] + array("i", [self.numbers] * self.rng.randint(1, 40))
        new, keeps = self.rng.choice([1, 5, 20, 40]), self.rng.random() < 0.2
        sampling = SamplingParams(max_new_tokens=new, priority=self.rng.choice([0, 0, 0, 1, 2]))
        number = self.number()
        self.cluster.submit(number, prompt, sampling, document=document, keeps=keeps)
        self.wanted[number] = new
        if keeps:
            self.keeping.add(number)

    def stop(self, number: int) -> None:
        self.stopped.add(number)
        self.cluster.stop(number)

    def hear(self) -> None:
        """Note saved documents, which users may then load."""
        for number, document in list(self.saving.items()):
            if number in self.cluster.ends:
                del self.saving[number]
                live = self.cluster.life.requests.get(document)
                where = live.saved if live is not None else None
                if self.cluster.ends[number][0] == "stop" and where is not None and where.place != OWN_DISK:
                    self.saved.append((live.prompt, where))

    def want(self, number: int) -> bool:
        """Whether a user waits for a request, or has a document."""
        return number not in self.stopped and (number in self.held() or number not in self.cluster.ends)


def add_worker(cluster: Simulated, rng: random.Random) -> None:
    """Add a worker of any size, on one of two hosts, perhaps without a model."""
    worker = f"w{next(cluster.names)}"
    cluster.add(worker)
    endpoint = Endpoint(worker, rng.choice(["127.0.0.1", "127.0.0.2"]), 1)
    model = rng.random() < 0.8 or not any(one.can_decode for one in cluster.life.ledger.workers.values())
    tiers = cluster.life.config.spill, rng.choice([0, 0, 700, 2000])
    cluster.handle(WorkerReady(endpoint, rng.randint(6, 24), model, *tiers))


def live_through(seed: int, events: int = 120) -> None:
    """Run a cluster and its users through random events, and check what must hold afterwards."""
    rng = random.Random(seed)
    policy, lends = rng.choice(sorted(POLICIES)), rng.choice([1.0, 1.0, 0.5])
    cluster = cluster_of(seed, policy=policy, lend_limit=lends, prefix_cache=rng.random() < 0.7)
    for _ in range(rng.randint(1, 4)):
        add_worker(cluster, rng)
    cluster.refusing = rng.random() < 0.5
    users = Users(cluster, rng)
    for what in rng.choices(list(HAPPENINGS), list(HAPPENINGS.values()), k=events):
        users.do(what)
    cluster.refusing = False
    for worker in list(cluster.pools):
        cluster.drain(worker, False)
    wait(cluster)
    users.hear()
    assert_all_that_fits_is_answered(users)
    give_everything_back(users)
    wait(cluster, 3)
    assert_nothing_left(cluster)


def wait(cluster: Simulated, seconds: int = ROUNDS) -> None:
    for _ in range(seconds):
        cluster.now += 1
        cluster.tick()
        finish(cluster)


def assert_all_that_fits_is_answered(users: Users) -> None:
    life = users.cluster.life
    limit = life.policy.limit(life.ledger)
    for number, new in users.wanted.items():
        reason, error = users.cluster.ends.get(number, ("waiting", None))
        assert reason != "waiting" or too_large(users.cluster, number, limit), (
            f"{life.requests[number]} was not answered"
        )
        assert (reason == "cancelled") <= (number in users.stopped)
        assert (reason == "error") == (error is not None)
        if reason in ("stop", "length"):
            assert users.cluster.tokens[number] == expected(number, new)
    for number, live in life.requests.items():
        needed = live.demand is not None and not live.demand.dependents.isdisjoint(life.requests)
        assert users.want(number) or needed or live.is_cached, f"nobody waits for {live}"
        if live.state.label == "waiting":
            assert too_large(users.cluster, number, limit), live
            assert aside(life, live), "it is said why it waits"
            needed = not live.is_document or not live.is_announced or bool(life.demand(number).awaited)
            assert needed, f"nobody waits for {live}"
        else:
            assert live.state.label in ("document", "dropped"), live


def too_large(cluster: Simulated, number: int, limit: int) -> bool:
    """Whether a request, or a document that it waits for, is larger than all workers together."""
    live = cluster.life.requests[number]
    if cluster.life.ledger.blocks(live.tokens) > limit:
        return True
    return (
        live.document in cluster.life.requests
        and live.state.label == "waiting"
        and too_large(cluster, live.document, limit)
    )


def give_everything_back(users: Users) -> None:
    for number in [*users.held(), *(n for n in (*users.wanted, *users.documents, *users.saving))]:
        if users.want(number):
            users.stop(number)


@pytest.mark.parametrize("seed", range(examples(50)))
def test_once_faults_stop_what_fits_is_answered_and_nothing_waits_for_nobody(seed: int) -> None:
    live_through(seed)
