"""Hidden states after a model's last norm, as the model without its head returns them, and sums over tokens of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distkv_dask.errors import ModelError, UnsupportedModelError

ROWS = 256
"""Tokens whose hidden states are converted to float64 at once."""


class HiddenStates:
    """Hands over the hidden states of a model's forwards, to the thread that runs the forward.

    Engines of one process share a model, so forwards of several threads may be under way at once.

    Parameters
    ----------
    model
        A transformers causal LM.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hooked = False
        self._lock = threading.Lock()
        self._here = threading.local()

    @contextmanager
    def taken(self, take: Callable[[Tensor], None] | None) -> Iterator[None]:
        """Hand over the hidden states of each forward of this thread while the context lasts.

        Parameters
        ----------
        take
            Called with them, [T, size] of flattened tokens; None does nothing.

        Raises
        ------
        UnsupportedModelError
            During the forward, when the model has none.
        """
        if take is None:
            yield
            return
        with self._lock:
            if not self._hooked:
                self._model.get_decoder().register_forward_hook(self._hand_over)
                self._hooked = True
        self._here.take = take
        try:
            yield
        finally:
            self._here.take = None

    def _hand_over(self, module: Any, given: Any, output: Any) -> None:
        if (take := getattr(self._here, "take", None)) is None:
            return
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            raise UnsupportedModelError(
                f"model type {self._model.config.model_type!r} does not show its hidden states, so texts have no "
                "embeddings: choose another model"
            )
        take(hidden.flatten(0, 1))


def summed(hidden: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Sums of hidden states over ranges of tokens, float64 [n, size] on their device.

    Parameters
    ----------
    hidden
        [T, size].
    ranges
        First token of each, and the one after its last; none is empty.
    """
    return torch.stack([_sum(hidden[first:last]) for first, last in ranges])


def _sum(hidden: Tensor) -> Tensor:
    whole = torch.zeros(hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for some in hidden.split(ROWS):
        whole += some.double().sum(0)
    return whole


def as_bytes(sums: Tensor) -> list[bytes]:
    """Sums [n, size] as little-endian float64, one after the other.

    Raises
    ------
    ModelError
        When they are not finite.
    """
    if not bool(sums.isfinite().all()):
        raise ModelError(
            "the model's hidden states are not finite: its weights are damaged, or its dtype overflows; open the "
            "engine with dtype='float32'"
        )
    return [row.astype("<f8").tobytes() for row in sums.cpu().numpy()]
