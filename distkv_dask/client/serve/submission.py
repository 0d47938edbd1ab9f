"""The requests to the engine that answer a call: submitted together, and cancelled together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from distkv_dask.client.serve.asked import Asked
from distkv_dask.client.serve.failures import Refusal
from distkv_dask.client.serve.serving import Serving
from distkv_dask.client.session.generation import Generation, Piece
from distkv_dask.completion import Completion


def submit_prompts(
    asked: Asked, serving: Serving, gone: asyncio.Task[None], on_piece: Callable[[int, Piece], None] | None = None
) -> list[Generation]:
    """Submit every prompt of a call; if one is refused, none is answered.

    Parameters
    ----------
    asked, serving
        The content of the call, and the open engine.
    gone
        Ends when the client has disconnected, or when the call needs no more answers: running requests are cancelled.
    on_piece
        Called with the number of a choice, over all prompts, and a piece of it.
    """
    generations: list[Generation] = []
    gone.add_done_callback(lambda _: [one.cancel() for one in generations])
    try:
        for at, (ids, sampling) in enumerate(asked.prompts):
            put = None if on_piece is None else partial(_numbered, on_piece, at * asked.choices)
            generations.append(serving.session.ask_ids(ids, sampling, put))
    except BaseException:
        gone.cancel()
        raise
    for generation in generations:
        serving.watch(generation)
    return generations


def result_of(generation: Generation) -> Completion:
    """The completion of a request that has ended.

    Raises
    ------
    DistKVError
        When it failed, or was cancelled because the server stops.
    """
    if generation.cancelled():
        raise Refusal("the server stopped before the answer was complete", 503, "stopping", 1)
    return generation.result()


def _numbered(on_piece: Callable[[int, Piece], None], first: int, piece: Piece) -> None:
    on_piece(first + piece.branch, piece)
