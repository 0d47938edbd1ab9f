"""What every endpoint needs: the engine, the model's names, default sampling parameters, and open requests."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from starlette.requests import Request

from distkv_dask.client.serve.failures import Refusal
from distkv_dask.client.serve.gate import Limits
from distkv_dask.client.serve.metrics import Metrics
from distkv_dask.client.session.generation import Generation
from distkv_dask.client.session.session import Session
from distkv_dask.completion import Completion
from distkv_dask.sampling import SamplingParams


class Serving:
    """An open engine behind a server.

    Parameters
    ----------
    session
        The engine's.
    names
        Names of the model for clients; answers have the first.
    sampling
        Defaults of requests. Its ``max_new_tokens`` is reduced if the model's window is shorter.
    limits
        Limits of the server.
    adapters
        Folders of adapters by the names with which clients ask for them.
    """

    def __init__(
        self,
        session: Session,
        names: Sequence[str],
        sampling: SamplingParams,
        limits: Limits,
        adapters: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.session = session
        self.adapters = adapters
        self.names = tuple(dict.fromkeys(names))
        self.limits = limits
        self.metrics = Metrics()
        self.began = int(time.time())
        self._sampling = sampling
        self._running: set[Future[Completion]] = set()

    def check_name(self, name: Any) -> str:
        """The model's name in answers to a request; raises :class:`Refusal` if the request names another model."""
        if not isinstance(name, str):
            raise Refusal(f"model is {name!r:.100}, but must be a text: name {self.names[0]!r}")
        if name in self.adapters:
            return name
        if name not in self.names:
            raise Refusal(f"model {name!r:.100} is not served here: name {self.names[0]!r}", 404, "model_not_found")
        return self.names[0]

    def sampling(self, said: Mapping[str, Any], prompt_tokens: int, model: str) -> SamplingParams:
        """Sampling parameters of a request to a model, from the values that the request gives."""
        usual = replace(self._sampling, adapter=self.adapters.get(model))
        if "max_new_tokens" not in said:
            room = self.session.facts.max_positions - prompt_tokens
            usual = replace(usual, max_new_tokens=int(max(1, min(usual.max_new_tokens, room))))
        return replace(usual, **said)

    def batch_sampling(self, priority: int) -> SamplingParams:
        """Default sampling parameters of a batch's requests."""
        return replace(self._sampling, priority=priority)

    def watch(self, generation: Generation) -> None:
        """Keep track of a request until it ends."""
        self._running.add(generation)
        generation.add_done_callback(self._ended)

    def _ended(self, generation: Future[Completion]) -> None:
        self._running.discard(generation)
        if generation.cancelled():
            self.metrics.cancelled.inc()

    def cancel_all(self) -> None:
        """End all open requests."""
        for generation in list(self._running):
            generation.cancel()


def serving_of(request: Request) -> Serving:
    """The engine and settings behind a call."""
    found: Serving = request.app.state.serving
    return found
