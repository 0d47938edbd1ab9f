"""Arrivals: what clients submit, as requests of the state machine."""

from __future__ import annotations

from array import array

from distkv_dask.messages.client_calls import Generate, Ingest, Load, Save, Submission
from distkv_dask.scheduler.records import kinds
from distkv_dask.scheduler.records.kinds import Answer, Demand, Document
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Asked, Request
from distkv_dask.scheduler.records.reuse import Parent


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
            return _save(life, one)
    raise TypeError(f"no request for {one!r}")


def _generation(life: MachineState, one: Generate) -> Request:
    sampling = one.sampling
    pooled = None if sampling.embed is None else 0 if sampling.embed == "mean" else len(one.prompt) - 1
    return Request(
        one.number,
        one.prompt,
        Asked(life.now, sampling, one.adapter),
        Answer(one.streamed, one.choices, Demand() if one.keeps else None, pooled=pooled),
        parent=None if one.document is None else Parent(one.document),
        # shared tokens are not computed: they have no logits and no hidden states
        alone=sampling.prompt_logprobs is not None or sampling.embed == "mean",
    )


def _document(life: MachineState, one: Ingest | Load) -> Request:
    """Whole blocks of a document: others share only these."""
    size = life.config.block_tokens
    prompt = one.prompt[: len(one.prompt) // size * size]
    return Request(one.number, prompt, Asked(life.now, adapter=one.adapter), Document(one.name))


def _save(life: MachineState, one: Save) -> Request:
    """A save has the adapter of its document, so that it shares its blocks, and gets its tokens once it is stored."""
    document = life.requests.get(one.document)
    asked = Asked(life.now, adapter=None if document is None else document.asked.adapter)
    return Request(one.number, array("i"), asked, kinds.Save(one.saved), Parent(one.document))
