"""Forwards as graphs, on a card made of lists: replays execute what was launched, piece by piece, with new values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from distkv_dask.geometry import Geometry
from distkv_dask.worker.device import Device
from distkv_dask.worker.model.captured import CapturedForward, why_not_captured


class Card(Device):
    """A card that executes queued work at once, or records it while a graph is open."""

    def __init__(self) -> None:
        super().__init__()
        self.recording: list[Callable[[], None]] | None = None
        self.launched = self.replayed = 0

    def queue(self, work: Callable[[], None]) -> None:
        """Launch a kernel."""
        self.launched += 1
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def wait(self) -> None:
        """Wait for the card, which is forbidden during a recording."""
        if self.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    def graph(self) -> Any:
        return Graph(self)


class Graph:
    """A recording."""

    def __init__(self, card: Card) -> None:
        self._card, self._work = card, list[Callable[[], None]]()

    def begin_capture(self) -> None:
        assert self._card.recording is None, "one recording at a time"
        self._card.recording = self._work

    def end_capture(self) -> None:
        assert self._card.recording is self._work
        self._card.recording = None

    def replay(self) -> None:
        assert self._card.recording is None
        self._card.replayed += 1
        for work in self._work:
            work()


class Attention:
    """Adds the layer's number, in a kernel, or after an exchange with a holder, which no graph may contain."""

    def __init__(self, card: Card, waits: bool) -> None:
        self._card, self._waits = card, waits
        self.layers: list[int] = []

    def attend(self, layer: int, q: torch.Tensor, *_: Any) -> torch.Tensor:
        self.layers.append(layer)
        if self._waits:
            self._card.wait()
        self._card.queue(lambda: q.add_(layer))
        return q


class Model:
    """Doubles its input before each of two layers, in its own memory."""

    def __init__(self, card: Card, layers: int = 2) -> None:
        self.given, self._hidden, self.logits = torch.zeros(1), torch.zeros(1), torch.zeros(1)
        self._card, self._layers = card, layers
        self.calls = 0

    def __call__(self, attention: Any) -> torch.Tensor:
        self.calls += 1
        self._card.queue(lambda: self._hidden.copy_(self.given))
        for layer in range(self._layers):
            self._card.queue(lambda: self._hidden.mul_(2))
            attention.attend(layer, self._hidden, self._hidden, self._hidden, 1.0, None)
        self._card.queue(lambda: self.logits.copy_(self._hidden))
        return self.logits

    @staticmethod
    def right(given: float, layers: int = 2) -> float:
        for layer in range(layers):
            given = 2 * given + layer
        return given


@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_every_step_has_its_own_values_and_only_two_are_launched(queued: bool, layers: int) -> None:
    card = Card()
    model, attention = Model(card, layers), Attention(card, waits=not queued)
    forward = CapturedForward(card, model, attention, queued)
    for step in range(6):
        model.given.fill_(step + 1)
        assert float(forward()) == Model.right(step + 1, layers)
    assert model.calls == 2, "one is launched by Python, one is recorded"
    assert attention.layers == [*range(layers)] * (2 if queued else 6)
    pieces = 1 if queued else layers + 1
    assert card.replayed == 5 * pieces, "what is recorded runs only when it is replayed"


def test_the_first_step_is_never_recorded() -> None:
    card = Card()
    model, attention = Model(card), Attention(card, waits=False)
    forward = CapturedForward(card, model, attention, queued=True)
    forward()
    assert (card.replayed, card.launched) == (0, 6)


def test_a_fault_while_recording_leaves_the_card_as_it_was() -> None:
    card = Card()
    model = Model(card)
    forward = CapturedForward(card, model, Attention(card, waits=True), queued=True)
    forward()
    with pytest.raises(RuntimeError, match="capturing"):
        forward()
    assert card.recording is None
    model.given.fill_(3)
    with suppress(RuntimeError):
        forward()
    assert card.recording is None


def test_a_fault_of_attention_between_two_pieces_leaves_no_recording() -> None:
    class Failing(Attention):
        def attend(self, layer: int, *given: Any) -> torch.Tensor:
            if layer == 1 and len(self.layers) > 2:
                raise ConnectionError("a holder is gone")
            return super().attend(layer, *given)

    card = Card()
    forward = CapturedForward(card, Model(card), Failing(card, waits=True), queued=False)
    forward()
    with pytest.raises(ConnectionError):
        forward()
    assert card.recording is None


GEOMETRY = Geometry(2, 1, 1, 8, 10, 0, "float32")


def test_a_forward_that_only_queues_can_be_captured() -> None:
    card = Card()
    model = Model(card)
    assert why_not_captured(card, model, GEOMETRY) == ""
    assert model.calls == 2, "libraries make handles at their first use"


def test_a_forward_that_waits_for_the_card_says_so() -> None:
    card = Card()

    def forward(attention: Any) -> torch.Tensor:
        card.wait()
        return torch.zeros(1)

    reason = why_not_captured(card, forward, GEOMETRY)
    assert reason == "RuntimeError: operation not permitted when stream is capturing"
    assert card.recording is None


def test_other_faults_are_not_a_reason_but_a_fault() -> None:
    def forward(attention: Any) -> torch.Tensor:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        why_not_captured(Card(), forward, GEOMETRY)
