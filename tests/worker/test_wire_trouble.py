"""Whatever the network between a home and a sound holder does during a window, all members notice it and continue."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import _proxy
import pytest
from _channels import UCX, Way
from _fakes import NEW, PROMPT, ROOM, Fleet, Recorder, fleet, loaded, reference, state
from _models import prompt_ids
from _proxy import Proxy, Trouble

from distkv_dask.errors import ChannelError, ChannelTimeoutError, DistKVError, GangAbortedError
from distkv_dask.gang import DecodeWindow, Gang

RECEIVE = 0.5
TROUBLE: dict[str, tuple[Trouble, type[ChannelError]]] = {
    "is cut, and nobody is told": (_proxy.silence, ChannelTimeoutError),
    "closes": (_proxy.close, ChannelError),
    "is reset": (_proxy.kill, ChannelError),
    "carries garbage": (_proxy.garble, ChannelError),
    "ends in mid-frame": (_proxy.truncate, ChannelError),
}


class Scripted(Recorder):
    """A model that does something before its n-th forward from now."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._calls = 0
        self._then: tuple[int, Callable[[], None]] | None = None

    def before(self, forwards: int, call: Callable[[], None]) -> None:
        self._then = self._calls + forwards, call

    def forward(self, *args: Any) -> Any:
        self._calls += 1
        if self._then is not None and self._calls == self._then[0]:
            self._then[1]()
        return super().forward(*args)


def through(proxy: Proxy, made: Fleet, holders: list[str]) -> Gang:
    gang = made.gang("w0", holders)
    return replace(gang, holders=(proxy.endpoint, *gang.holders[1:]))


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("others", [(), ("w2",)])
def test_a_network_that_fails_in_mid_window_costs_one_window_and_no_token(
    way: Way, trouble: str, others: tuple[str, ...]
) -> None:
    if way is UCX:
        pytest.skip("the proxy that plays the network carries sockets, not UCX")
    effect, kind = TROUBLE[trouble]
    model = Scripted(loaded("llama-gqa"))
    with fleet(model, 3, way, timeout_receive=RECEIVE) as made:
        proxy = Proxy(way, made.members["w1"].lanes.endpoint)
        try:
            placement = made.place(1, ("w1", 32), *((worker, 16) for worker in others), ("w0", ROOM))
            first = made.prefill(1, placement, prompt_ids(PROMPT))
            before = state(1, placement, PROMPT, first, NEW - 1)
            holders = ["w1", *others]

            gang = through(proxy, made, holders)
            sessions = [made.members[worker].runtime.open_session(gang) for worker in holders]
            model.before(3, lambda: setattr(proxy, "trouble", effect))
            home, began = made.members["w0"], time.monotonic()
            error = home.lanes.home.submit(home.runtime.decode, DecodeWindow(gang, 0, 5, 60.0), [before]).exception(20)
            seen = [session.result.exception(20) for session in sessions]
            seconds = time.monotonic() - began
            assert isinstance(error, kind if not others or kind is ChannelTimeoutError else ChannelError), error
            assert "w1" in str(error)
            assert all(isinstance(one, DistKVError) for one in seen), seen
            assert all(isinstance(one, GangAbortedError) and "home w0 failed" in str(one) for one in seen[1:])
            assert seconds < 5  # the holder beyond the cut waits twice the limit for its home

            proxy.trouble = None
            opened = proxy.opened
            result, _ = made.decode("w0", [before], NEW, through(proxy, made, holders))
            assert [first, *result.tokens[1]] == reference("llama-gqa").tokens
            assert proxy.opened == opened + 1
            made.decode("w0", [before], NEW, through(proxy, made, holders))
            assert proxy.opened == opened + 1  # a sound channel is kept
            made.release_sequence(1)
        finally:
            proxy.close()
