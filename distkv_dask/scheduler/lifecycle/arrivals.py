"""Arrivals: what clients submit, as requests of the state machine."""

from __future__ import annotations

from array import array

from distkv_dask.messages.client_calls import Generate, Ingest, Load, Save, Submission
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request


def arrived(life: MachineState, one: Submission) -> Request:
    """The request that a client has submitted, before it is accepted.

    Raises
    ------
    TypeError
        There is no such kind of submission.
    """
    match one:
        case Generate():
            return _generation(life, one)
        case Ingest():
            return _document(life, one)
        case Load():
            request = _document(life, one)
            request.saved = one.saved
            return request
        case Save():
            request = Request(one.number, array("i"), SamplingParams(), life.now, document=one.document, saves=True)
            request.saved = one.saved
            return request
    raise TypeError(f"no request for {one!r}")


def _generation(life: MachineState, one: Generate) -> Request:
    sampling = one.sampling
    return Request(
        one.number,
        one.prompt,
        sampling,
        submitted=life.now,
        streamed=one.streamed,
        document=one.document,
        keeps=one.keeps,
        choices=one.choices,
        adapter=one.adapter,
        # shared tokens are not computed: they have no logits and no hidden states
        alone=sampling.prompt_logprobs is not None or sampling.embed == "mean",
        pooled=len(one.prompt) - 1 if sampling.embed == "last" else 0,
    )


def _document(life: MachineState, one: Ingest | Load) -> Request:
    """Whole blocks of a document: others share only these."""
    size = life.config.block_tokens
    prompt = one.prompt[: len(one.prompt) // size * size]
    return Request(one.number, prompt, SamplingParams(), life.now, is_document=True, name=one.name, adapter=one.adapter)
