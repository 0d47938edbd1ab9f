"""Every event in every state: the request's next state, and the commands to the gManager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from _happenings import EVENTS, ONE, state
from _simulated import Simulated, assert_nothing_left, expected, settle
from _situations import SITUATIONS

from distkv_dask.scheduler.lifecycle.events import Event


def outcome(cluster: Simulated, happening: Callable[[Simulated], Event | None]) -> tuple[str, tuple[str, ...]] | None:
    """Trigger an event; returns the next state and the kinds of commands, or None if the event is impossible here."""
    event = happening(cluster)
    if event is None:
        return None
    commands = cluster.watch()
    cluster.handle(event)
    return state(cluster), tuple(dict.fromkeys(type(one).__name__ for one in commands))


TABLE = """
waiting                | stop, cancel                | gone     | Delivery
                       | close                       | gone     | Delivery Abort ForgetTasks Retire
                       | joined                      | Prefill  | Reserve SubmitPrefill
question               | stop, cancel, close         | gone     | Delivery
prefill                | chunk                       | Prefill  | ForgetTasks
                       | aborted                     | Prefill  | Abort ForgetTasks SubmitPrefill
                       | fault, stop, cancel, close  | Retiring | Delivery Abort ForgetTasks Retire
                       | home lost                   | Retiring | Abort ForgetTasks Note Retire
                       | holder lost                 | Retiring | ForgetTasks Abort Note Retire
last chunk             | chunk                       | Decode   | ForgetTasks Delivery Join SubmitWindow
                       | aborted                     | Prefill  | Abort ForgetTasks SubmitPrefill
                       | fault, stop, cancel, close  | Retiring | Delivery Abort ForgetTasks Retire
                       | home lost, holder lost      | Retiring | Abort ForgetTasks Note Retire
decode                 | window                      | Decode   | Abort ForgetTasks Delivery SubmitWindow
                       | aborted                     | Decode   | Abort ForgetTasks Reset Join SubmitWindow
                       | fault                       | Retiring | Abort ForgetTasks Reset Delivery Retire
                       | stop, cancel, close         | Retiring | Delivery Retire
                       | home lost                   | Retiring | Abort ForgetTasks Note Retire
                       | holder lost                 | Retiring | Abort ForgetTasks Reset Note Retire
                       | drain                       | Decode   | Expect
window                 | window                      | Decode   | Abort ForgetTasks Delivery
                       | aborted                     | Decode   | Abort ForgetTasks Reset Join SubmitWindow
                       | fault                       | Retiring | Abort ForgetTasks Reset Delivery Retire
                       | stop, cancel, close         | Retiring | Delivery Retire
                       | home lost                   | Retiring | Abort ForgetTasks Note Retire
                       | holder lost                 | Retiring | Abort ForgetTasks Reset Note Retire
                       | drain                       | Decode   | Expect
cancelled              | window                      | Retiring | Abort ForgetTasks
                       | retired                     | Retiring | Retire
                       | home lost                   | Retiring | Abort ForgetTasks Retire
                       | holder lost                 | Retiring | Abort ForgetTasks Reset
cancelled, one left    | window                      | Retiring | Abort ForgetTasks
                       | retired                     | gone     | Release
                       | home lost                   | gone     | Abort ForgetTasks Release
                       | holder lost                 | Retiring | Abort ForgetTasks Reset
losing                 | retired                     | Retiring | Retire
                       | stop, cancel, close         | Retiring | Delivery
                       | home lost                   | Waiting  |
losing, one left       | retired                     | Prefill  | Reserve SubmitPrefill
                       | stop, cancel, close         | Retiring | Delivery
                       | home lost                   | Waiting  |
making way             | window                      | Retiring | Abort ForgetTasks
                       | retired                     | Retiring | Retire
                       | stop, cancel, close         | Retiring | Delivery
                       | home lost                   | Retiring | Abort ForgetTasks Retire
                       | holder lost                 | Retiring | Abort ForgetTasks Reset
                       | joined                      | Retiring | Reserve SubmitPrefill
making way, one left   | window                      | Retiring | Abort ForgetTasks
                       | retired                     | Spilling | Note Store
                       | stop, cancel, close         | Retiring | Delivery
                       | home lost                   | Waiting  | Abort ForgetTasks Release
                       | holder lost                 | Retiring | Abort ForgetTasks Reset
                       | joined                      | Retiring | Reserve SubmitPrefill
interrupted            | window                      | Retiring | Abort ForgetTasks
                       | close                       | Retiring | Release
                       | home lost                   | Retiring | Abort ForgetTasks Discard
                       | holder lost                 | Retiring | Discard Abort ForgetTasks Reset
interrupted, one left  | window                      | Retiring | Abort ForgetTasks
                       | fetched, not fetched        | gone     | Release Discard
                       | close                       | Retiring | Release
                       | home lost                   | gone     | Abort ForgetTasks Discard Release
                       | holder lost                 | Retiring | Discard Abort ForgetTasks Reset
keeping                | window                      | Retiring | ForgetTasks
                       | retired                     | Retiring | Retire
                       | home lost                   | Dropped  | ForgetTasks
keeping, one left      | window                      | Retiring | ForgetTasks
                       | retired                     | Stored   | Free
                       | home lost                   | Dropped  | ForgetTasks
keeping little, one left | window                      | Retiring | ForgetTasks
                       | retired                     | Stored   | Release
                       | home lost                   | Stored   | ForgetTasks
losing room            | retired                     | Decode   | Reserve Join SubmitWindow
                       | stop, cancel, close         | Retiring | Delivery
                       | holder lost                 | Waiting  |
spilling               | window, home lost           | Spilling | Abort ForgetTasks
                       | stop, cancel, close         | Spilling | Delivery
                       | holder lost                 | Spilling | Abort ForgetTasks Reset
                       | joined                      | Spilling | Reserve SubmitPrefill
                       | late                        | Waiting  | Release Reserve SubmitPrefill
spilling, one left     | window                      | Spilling | Abort ForgetTasks
                       | stored                      | Waiting  | Release Reserve SubmitPrefill
                       | not stored, late            | Waiting  | Discard Release Reserve SubmitPrefill
                       | stop, cancel, close         | Spilling | Delivery
                       | home lost                   | Waiting  | Abort ForgetTasks Discard Release
                       | holder lost                 | Spilling | Abort ForgetTasks Reset
                       | joined                      | Spilling | Reserve SubmitPrefill
on disk                | stop, cancel                | gone     | Delivery Discard
                       | close                       | gone     | Delivery Discard Abort ForgetTasks Retire
                       | joined                      | Fetching | Reserve Note Fetch
fetching               | window                      | Fetching | Abort ForgetTasks
                       | stop, cancel                | Retiring | Delivery
                       | close                       | Retiring | Release Delivery
                       | home lost                   | Retiring | Abort ForgetTasks Discard Note
                       | holder lost                 | Retiring | Discard Abort ForgetTasks Reset Note
fetching, one left     | window                      | Fetching | Abort ForgetTasks
                       | fetched                     | Decode   | Discard Join
                       | not fetched                 | Prefill  | Discard SubmitPrefill
                       | stop, cancel                | Retiring | Delivery
                       | close                       | Retiring | Release Delivery
                       | home lost                   | Waiting  | Abort ForgetTasks Discard Note Release
                       | holder lost                 | Retiring | Discard Abort ForgetTasks Reset Note
saving                 | stop, cancel, close         | gone     | Delivery Release
saving, one left       | stored, not stored, stop, cancel, close, home lost | gone     | Delivery Release
ingested               | chunk                       | Prefill  | ForgetTasks
                       | aborted                     | Prefill  | Abort ForgetTasks SubmitPrefill
                       | fault, stop, cancel, close  | Retiring | Delivery Abort ForgetTasks Retire
                       | home lost                   | Retiring | Abort ForgetTasks Retire
                       | holder lost                 | Retiring | ForgetTasks Abort Retire
stored                 | cancel, close               | gone     | Release
                       | home lost, holder lost      | Dropped  | Release
                       | drain                       | Stored   | Expect
short                  | cancel, close               | gone     |
crowded                | close                       | Spilling | Delivery
                       | joined                      | Spilling | Reserve SubmitPrefill
                       | late                        | Dropped  | Release Reserve SubmitPrefill
crowded, one left      | stored                      | Dropped  | Release Reserve SubmitPrefill
                       | not stored, late            | Dropped  | Discard Release Reserve SubmitPrefill
                       | close                       | Spilling | Delivery
                       | home lost                   | Dropped  | Discard Release
                       | joined                      | Spilling | Reserve SubmitPrefill
dropped                | cancel                      | gone     | Discard
                       | close                       | gone     | Discard Delivery Abort ForgetTasks Retire
asked again            | close                       | gone     | Delivery Abort ForgetTasks Retire Discard
                       | joined                      | Fetching | Reserve Note Fetch
coming back            | close                       | Fetching | Release Delivery
                       | home lost, holder lost      | Retiring | Discard
coming back, one left  | fetched                     | Stored   | Free Reserve SubmitPrefill
                       | not fetched                 | Prefill  | Discard Release Reserve SubmitPrefill
                       | close                       | Fetching | Release Delivery
                       | home lost                   | Waiting  | Discard Release
                       | holder lost                 | Retiring | Discard
expecting              | window                      | Decode   | Abort ForgetTasks Delivery SubmitWindow
                       | aborted                     | Decode   | Abort ForgetTasks Reset Join SubmitWindow
                       | fault                       | Retiring | Abort ForgetTasks Reset Delivery Retire
                       | expected                    | Decode   | Note Send
                       | refused, late               | Decode   | Free
                       | stop, cancel, close         | Retiring | Delivery Retire
                       | home lost                   | Retiring | Abort ForgetTasks Note Retire
                       | holder lost                 | Retiring | Abort ForgetTasks Reset Note Retire
sending                | window                      | Decode   | Abort ForgetTasks Delivery SubmitWindow
                       | aborted                     | Decode   | Abort ForgetTasks Reset Join SubmitWindow
                       | fault                       | Retiring | Abort ForgetTasks Reset Delivery Retire
                       | sent                        | Decode   | Relocate AddHolders
                       | not sent, late              | Decode   | Free
                       | stop, cancel, close         | Retiring | Delivery Retire
                       | home lost                   | Retiring | Abort ForgetTasks Note Retire
                       | holder lost                 | Retiring | Abort ForgetTasks Reset Note Retire
switching              | window                      | Decode   | Abort ForgetTasks Delivery SubmitWindow
                       | aborted, target lost        | Decode   | Abort ForgetTasks Reset Join SubmitWindow
                       | fault                       | Retiring | Abort ForgetTasks Reset Delivery Retire
                       | relocated                   | Decode   | Free
                       | stop, cancel, close         | Retiring | Delivery Retire
                       | home lost                   | Retiring | Abort ForgetTasks Note Retire
                       | holder lost                 | Retiring | Abort ForgetTasks Reset Note Retire
expecting with a pause | window                      | Decode   | Abort ForgetTasks Delivery SubmitWindow
                       | aborted                     | Decode   | Abort ForgetTasks Reset Join SubmitWindow
                       | fault                       | Retiring | Abort ForgetTasks Reset Delivery Retire
                       | expected                    | Decode   | Retire
                       | refused, late               | Decode   | Free
                       | stop, cancel, close         | Retiring | Delivery Retire
                       | home lost                   | Retiring | Abort ForgetTasks Note Retire
                       | holder lost                 | Retiring | Abort ForgetTasks Reset Note Retire
pausing                | window                      | Decode   | Abort ForgetTasks
                       | retired                     | Decode   | Note Send
                       | stop, cancel, close         | Retiring | Delivery Retire
                       | home lost                   | Retiring | Abort ForgetTasks Note Retire
                       | holder lost                 | Retiring | Abort ForgetTasks Reset Note Retire
sending with a pause   | window                      | Decode   | Abort ForgetTasks
                       | sent                        | Decode   | Free Join SubmitWindow
                       | not sent, late              | Decode   | Free Join
                       | stop, cancel, close         | Retiring | Delivery Retire
                       | home lost                   | Retiring | Abort ForgetTasks Note Retire
                       | holder lost                 | Retiring | Abort ForgetTasks Reset Note Retire
                       | target lost                 | Decode   | Join
"""
"""By situation and events: the next state, and the commands. Events that are not listed change nothing."""


def rows() -> dict[tuple[str, str], tuple[str, tuple[str, ...]]]:
    found, situation = {}, ""
    for line in TABLE.strip().splitlines():
        first, events, after, commands = (part.strip() for part in line.split("|"))
        situation = first or situation
        for event in events.split(", "):
            assert (situation, event) not in found
            found[situation, event] = after, tuple(commands.split())
    return found


ROWS = rows()
PAIRS = [(situation, event) for situation in SITUATIONS for event in EVENTS]


def test_the_table_speaks_of_situations_and_events_that_there_are() -> None:
    assert ROWS.keys() <= {*PAIRS}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_an_event_leads_to_the_state_of_the_table_with_its_commands(situation: str) -> None:
    before, make = SITUATIONS[situation]
    for event, happening in EVENTS.items():
        cluster = make()
        assert state(cluster) == before
        found = outcome(cluster, happening)
        if found is None:
            assert (situation, event) not in ROWS, f"{event} cannot happen"
        else:
            assert found == ROWS.get((situation, event), (before, ())), event


@pytest.mark.parametrize("situation", SITUATIONS)
def test_after_any_event_all_are_answered_or_told_why_not_and_nothing_is_left(situation: str) -> None:
    live_after_each_event(situation)


def live_after_each_event(situation: str) -> None:
    for event, happening in EVENTS.items():
        cluster = SITUATIONS[situation][1]()
        requests = [one for one in cluster.life.requests.values() if not one.is_document]
        ended = {one.sequence: one.ended for one in requests if one.ended is not None}
        if outcome(cluster, happening) is None:
            continue
        for _ in range(2):
            cluster.add_worker(16)
        cluster.drain("w1", False)
        cluster.pause()
        settle(cluster)
        stops = {"stop": {ONE: "stop"}, "cancel": {ONE: "cancelled"}}
        wanted = {one.sequence: "stop" if one.is_save else "length" for one in requests}
        wanted |= stops.get(event, dict.fromkeys(wanted, "cancelled") if event == "close" else {}) | ended
        for request in requests:
            number, (reason, error) = request.sequence, cluster.ends[request.sequence]
            fails = number == ONE and (event == "fault" or (request.is_save and stays_unwritten(situation, event)))
            assert reason == ("error" if fails else wanted[number]), (event, number, error)
            assert (error is not None) == fails
            answer = [] if request.is_save else expected(number, request.asked.sampling.max_new_tokens)
            assert cluster.tokens[number] == (answer if reason == "length" else answer[: len(cluster.tokens[number])])
        for number in [*cluster.life.requests]:
            cluster.stop(number)
        settle(cluster)
        assert_nothing_left(cluster)


def stays_unwritten(situation: str, event: str) -> bool:
    """Whether a worker cannot write its part of a document; the holder's part may be written already."""
    return event in ("not stored", "home lost") or (event == "holder lost" and situation == "saving")
