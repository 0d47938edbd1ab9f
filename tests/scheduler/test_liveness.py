"""Whatever happens: once faults stop, what fits is answered, nothing waits for nobody, and nothing is left."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

import pytest
from test_lifecycle import Simulated, assert_nothing_left, blocks, cluster_of, expected, finish

from distkv_dask.errors import CapacityError, InvalidRequestError
from distkv_dask.protocol import OWN_DISK, Saved, SavedFile
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.policies import POLICIES
from distkv_dask.types import Endpoint, SamplingParams

HAPPENINGS = {
    "submit": 8, "ask": 6, "ingest": 3, "save": 2, "load": 2, "cancel": 3, "release": 2, "step": 40, "tick": 3,
    "lose": 2, "join": 2, "drain": 1, "stay": 1, "fail": 2, "fault": 1, "move": 3, "rot": 1, "late": 1,
}  # fmt: skip
ROUNDS = 100
"""Seconds of the gManager's clock after the last fault, within which all that fits has to be answered."""


@dataclass
class Users:
    """People who use a simulated cluster: what they asked for, and what they have not given back."""

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
        cluster, life = self.cluster, self.cluster.life
        try:
            match what:
                case "submit" | "ask":
                    self.ask(what == "ask")
                case "ingest":
                    prompt = array("i", range(self.rng.randrange(1000), 10**6))[: self.rng.randint(1, 70)]
                    cluster.run(life.ingest(self.number(), prompt, cluster.now))
                    self.documents.add(self.numbers)
                case "load" if self.saved:
                    prompt, where = self.rng.choice(self.saved)
                    cluster.run(life.ingest(self.number(), prompt, cluster.now, where))
                    self.documents.add(self.numbers)
                case "save" if held := sorted(self.documents & {*self.held()}):
                    document = self.rng.choice(held)
                    cluster.run(
                        life.save(self.number(), document, Saved("folder", tag=f"s{self.numbers}"), cluster.now)
                    )
                    self.saving[self.numbers] = document
                case "cancel" if running := [n for n in (*self.wanted, *self.saving) if n not in cluster.ends]:
                    self.stop(self.rng.choice(running))
                case "release" if held := self.held():
                    self.stop(self.rng.choice(held))
                case "tick":
                    cluster.now += 1
                    cluster.run(life.expire(cluster.now))
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
        """Documents that have been stored and not given back."""
        ends = self.cluster.ends
        stored = {n for n in self.documents if ends.get(n, ("",))[0] == "stop"}
        kept = {n for n in self.keeping if ends.get(n, ("",))[0] in ("stop", "length")}
        return sorted((stored | kept) - self.stopped)

    def ask(self, about: bool) -> None:
        life, held = self.cluster.life, self.held()
        document = self.rng.choice(held) if about and held else None
        beginning = life.live[document].prompt if document in life.live else array("i")
        prompt = beginning[: self.rng.randint(1, 80)] + array("i", [self.numbers] * self.rng.randint(1, 40))
        new, keeps = self.rng.choice([1, 5, 20, 40]), self.rng.random() < 0.2
        sampling = SamplingParams(max_new_tokens=new, priority=self.rng.choice([0, 0, 0, 1, 2]))
        number = self.number()
        self.cluster.run(life.submit(number, prompt, sampling, self.cluster.now, False, document, keeps))
        self.wanted[number] = new
        if keeps:
            self.keeping.add(number)

    def stop(self, number: int) -> None:
        self.stopped.add(number)
        self.cluster.run(self.cluster.life.stop(number, "cancelled", self.cluster.now))

    def hear(self) -> None:
        """Who hears that a document is saved may load it."""
        for number, document in list(self.saving.items()):
            if number in self.cluster.ends:
                del self.saving[number]
                live = self.cluster.life.live.get(document)
                where = live.saved if live is not None else None
                if self.cluster.ends[number][0] == "stop" and where is not None and where.place != OWN_DISK:
                    self.saved.append((live.prompt, where))

    def want(self, number: int) -> bool:
        """Whether somebody waits for a request, or has a document."""
        return number not in self.stopped and (number in self.held() or number not in self.cluster.ends)


@dataclass
class Shared(Simulated):
    """A simulated cluster whose workers reach a folder."""

    folder: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=dict)

    def use_disk(self, message: do.Store | do.Fetch) -> None:
        if message.saved.place == OWN_DISK:
            super().use_disk(message)
            return
        if message.worker not in self.pools:
            return
        table, files, failure = self.pools[message.worker].get(message.sequence, {}), [], None
        if isinstance(message, do.Store):
            for start, stop in message.ranges:
                name = f"{message.saved.tag}-{start}"
                files.append(SavedFile(name, start, stop, 0, 0))
                self.folder[name] = {block: table[block] for block in blocks(start, stop) if block in table}
            self.run(self.life.saved(message.number, message.worker, tuple(files), None, self.now))
            return
        for start, stop in message.ranges:
            for file in message.saved.files:
                for block in set(blocks(file.start, file.stop)) & set(blocks(start, stop)):
                    if block in table:  # else it was given up meanwhile
                        table[block] = self.folder[file.name][block]
        self.run(self.life.fetched(message.sequence, message.worker, failure, self.now))


def add_worker(cluster: Simulated, rng: random.Random) -> None:
    """A worker of any size, on one of two hosts, perhaps without a model."""
    worker = f"w{next(cluster.names)}"
    cluster.pools[worker], cluster.batches[worker], cluster.epochs[worker], cluster.disks[worker] = {}, {}, 0, {}
    endpoint = Endpoint(worker, rng.choice(["127.0.0.1", "127.0.0.2"]), 1)
    model = rng.random() < 0.8 or not any(one.can_decode for one in cluster.life.ledger.workers.values())
    spill = cluster.life.config.spill
    cluster.run(
        cluster.life.worker_ready(endpoint, rng.randint(6, 24), cluster.now, can_decode=model, spill_bytes=spill)
    )


def shared_cluster(seed: int, **settings: float) -> Shared:
    plain = cluster_of(seed, **settings)
    return Shared(plain.life, plain.rng)


def live_through(seed: int, events: int = 120) -> None:
    """A random life of a cluster and its users, and what has to hold afterwards."""
    rng = random.Random(seed)
    policy, lends = rng.choice(sorted(POLICIES)), rng.choice([1.0, 1.0, 0.5])
    cluster = shared_cluster(seed, policy=policy, lend_limit=lends, prefix_cache=rng.random() < 0.7)
    for _ in range(rng.randint(1, 4)):
        add_worker(cluster, rng)
    cluster.refusing = rng.random() < 0.5
    users = Users(cluster, rng)
    for what in rng.choices(list(HAPPENINGS), list(HAPPENINGS.values()), k=events):
        users.do(what)
    cluster.refusing = False
    for worker in list(cluster.pools):
        cluster.run(cluster.life.drain(worker, False, cluster.now))
    wait(cluster)
    users.hear()
    assert_all_that_fits_is_answered(users)
    give_everything_back(users)
    wait(cluster, 3)
    assert_nothing_left(cluster)


def wait(cluster: Simulated, seconds: int = ROUNDS) -> None:
    for _ in range(seconds):
        cluster.now += 1
        cluster.run(cluster.life.expire(cluster.now))
        finish(cluster)


def assert_all_that_fits_is_answered(users: Users) -> None:
    life = users.cluster.life
    limit = life.policy.limit(life.ledger)
    for number, new in users.wanted.items():
        reason, error = users.cluster.ends.get(number, ("waiting", None))
        assert reason != "waiting" or too_large(users.cluster, number, limit), f"{life.live[number]} was not answered"
        assert (reason == "cancelled") <= (number in users.stopped)
        assert (reason == "error") == (error is not None)
        if reason in ("stop", "length"):
            assert users.cluster.tokens[number] == expected(number, new)
    for number, live in life.live.items():
        needed = [one for one in live.dependents if one in life.live]
        assert users.want(number) or needed or live.cached, f"nobody waits for {live}"
        if live.state == "waiting":
            assert too_large(users.cluster, number, limit), live
            assert life.aside(live), "it is said why it waits"
            assert not live.is_document or live.awaited or not live.announced, f"nobody waits for {live}"
        else:
            assert live.state in ("document", "dropped"), live


def too_large(cluster: Simulated, number: int, limit: int) -> bool:
    """Whether a request, or a document that it waits for, is larger than all workers together."""
    live = cluster.life.live[number]
    if cluster.life.ledger.blocks(live.tokens) > limit:
        return True
    return live.document in cluster.life.live and live.state == "waiting" and too_large(cluster, live.document, limit)


def give_everything_back(users: Users) -> None:
    for number in [*users.held(), *(n for n in (*users.wanted, *users.documents, *users.saving))]:
        if users.want(number):
            users.stop(number)


@pytest.mark.parametrize("seed", range(100))
def test_once_faults_stop_what_fits_is_answered_and_nothing_waits_for_nobody(seed: int) -> None:
    live_through(seed)
