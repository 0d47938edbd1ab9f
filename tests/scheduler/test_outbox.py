"""News for a client: each once and in order, whatever replies are lost and however polls overtake each other."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.messages.client_calls import Delivery
from distkv_dask.scheduler.engines.outbox import Outbox


def news(number: int) -> Delivery:
    return Delivery(number, (number,))


@given(st.lists(st.sampled_from(["put", "poll", "poll", "lost", "late"]), max_size=40))
def test_a_reader_hears_everything_once_and_in_order(happenings: list[str]) -> None:
    async def run() -> None:
        box, heard, polls, written = Outbox("client"), list[Delivery](), list[int](), 0
        for what in happenings:
            match what:
                case "put":
                    box.put(news(written))
                    written += 1
                case "poll" | "lost":
                    polls.append(len(heard))
                    reply = await box.take_unheard(len(heard), 0.0)
                    if what == "poll":
                        heard += reply
                case "late" if polls:
                    await box.take_unheard(
                        polls[0], 0.0
                    )  # a poll that was overtaken; nobody waits for its reply any longer
        heard += await box.take_unheard(len(heard), 0.0)
        assert heard == [news(number) for number in range(written)]
        assert await box.take_unheard(len(heard), 0.0) == []

    asyncio.run(run())


def test_a_poll_waits_for_news_and_comes_back_with_them() -> None:
    async def run() -> None:
        box = Outbox("client")
        poll = asyncio.create_task(box.take_unheard(0, 60.0))
        await asyncio.sleep(0)
        assert not poll.done()
        box.put(news(7))
        assert await asyncio.wait_for(poll, 30) == [news(7)]
        poll = asyncio.create_task(box.take_unheard(1, 60.0))
        await asyncio.sleep(0)
        box.close()
        assert await asyncio.wait_for(poll, 30) == []
        assert await asyncio.wait_for(box.take_unheard(1, 60.0), 30) == [], "nobody waits once it is closed"

    asyncio.run(run())


def test_what_was_not_heard_can_be_heard_after_the_end() -> None:
    async def run() -> None:
        box = Outbox("client")
        box.put(news(1))
        box.close()
        assert await box.take_unheard(0, 60.0) == [news(1)]
        assert await box.take_unheard(0, 60.0) == [news(1)]
        assert await box.take_unheard(1, 60.0) == []

    asyncio.run(run())
