"""One stage's channel, shared by all forwards under way at its home: first in, first out, and two at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from distkv_dask.errors import GangAbortedError, in_words
from distkv_dask.worker.channels.base import Channel

AHEAD = 2
"""Frames that a stage has at most: one that it computes, and the next one."""


class Line:
    """Forwards that a stage computes, in the order in which they entered.

    So a stage computes chunks of a prompt in their order, and only one thread sends and one receives at a time. Waits
    end: each is for a call on the channel, which has a time limit, or for :meth:`break_off`.

    Parameters
    ----------
    channel
        To the stage.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._changed = threading.Condition()
        self._entered = self._sent = self._answered = 0
        self._broken = ""

    def enter(self) -> int:
        """Take the next place."""
        with self._changed:
            self._entered += 1
            return self._entered - 1

    @contextmanager
    def sending(self, place: int) -> Iterator[Channel]:
        """Wait until it is this place's turn to send; GangAbortedError if the line breaks off."""
        self._wait(lambda: self._sent == place and place < self._answered + AHEAD)
        yield self.channel
        with self._changed:
            self._sent += 1
            self._changed.notify_all()

    @contextmanager
    def receiving(self, place: int) -> Iterator[Channel]:
        """Wait until this place's answer is the next one; GangAbortedError if the line breaks off."""
        self._wait(lambda: self._answered == place)
        yield self.channel
        with self._changed:
            self._answered += 1
            self._changed.notify_all()

    def break_off(self, error: BaseException) -> None:
        """Let nobody wait any more, because of an error of one of them; from any thread."""
        with self._changed:
            self._broken = self._broken or in_words(error)
            self._changed.notify_all()
        self.channel.abort()

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._broken or condition())
            if self._broken:
                raise GangAbortedError(f"another forward of the gang failed: {self._broken}")
