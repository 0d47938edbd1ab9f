"""Progress: finished chunks and windows, and their tokens."""

from __future__ import annotations

from distkv_dask.messages.client_calls import Delivery
from distkv_dask.messages.from_worker import ChunkDone, Prefilled, WindowDone
from distkv_dask.messages.to_worker import Abort
from distkv_dask.scheduler.commands import ForgetTasks
from distkv_dask.scheduler.lifecycle.ends import end
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Decode, Prefill, Stored
from distkv_dask.scheduler.work import homes, prefill


def chunk_done(life: MachineState, event: ChunkDone | Prefilled) -> None:
    """A worker finished a chunk; it is recorded when all before it are, which others may compute at the same time."""
    request = life.requests.get(event.sequence)
    if request is None or not isinstance(state := request.state, Prefill) or event.gang not in state.chunks:
        return
    state.computed(event)
    while (done := state.next_result()) is not None:
        _commit_chunk(life, request, state, done)
        if isinstance(done, Prefilled):
            _prefilled(life, request, done)
        elif not state.chunks and request.asked.sampling.embed is not None:
            request.answer.decoding = life.now
            end(life, request, "stop", settled=True)
        elif not state.chunks:
            life.recommend(request, Stored() if request.is_document else Decode())  # the latter lost blocks in decode
    if state.wavefront:
        prefill.submit_next(life, request, state)


def _prefilled(life: MachineState, request: Request, event: Prefilled) -> None:
    """A prompt's last chunk is done and its first token drawn (not drawn when ``reason`` is "stop")."""
    answer = request.answer
    answer.decoding = life.now
    if event.chosen is not None:
        tokens, logprobs, scores = event.chosen
        answer.generated.extend(tokens)
        life.command(Delivery(event.sequence, tokens, logprobs=logprobs, scores=scores))
    elif event.reason != "stop":
        answer.generated.append(event.token)
        logprobs = () if event.logprob is None else (event.logprob,)
        life.command(Delivery(event.sequence, (event.token,), logprobs=logprobs))
    if event.reason is not None:
        end(life, request, event.reason, settled=True)
    else:
        life.recommend(request, Decode())


def _commit_chunk(life: MachineState, request: Request, state: Prefill, event: ChunkDone | Prefilled) -> None:
    """Record that a chunk is computed."""
    chunk = state.record(event.gang)
    if event.scored:
        life.command(Delivery(request.sequence, (), scored=event.scored, scored_from=chunk.start + 1))
    if isinstance(event, ChunkDone) and event.pooled is not None:
        request.answer.pooled = event.pooled.stop
        life.command(Delivery(request.sequence, (), pooled=event.pooled))
    life.ledger.commit(request.sequence, chunk.stop if state.chunks else request.known_tokens)
    life.pacer.prefilled(1 + len(chunk.gang.holders))
    for holder in chunk.gang.holders if event.joined else ():
        reason = "it was computed together with another chunk"
        life.command(Abort(holder.worker, chunk.gang.number, reason, unused=True))
    life.command(ForgetTasks(chunk.gang, finished=True))
    if not state.chunks:
        life.in_prefill.pop(request.sequence, None)


def window_done(life: MachineState, event: WindowDone) -> None:
    """A home finished a window: its tokens are committed, and sequences that ended leave."""
    result = event.result
    if not homes.window_done(life, event):
        return
    if result.steps:
        life.moves.step_seconds[event.worker] = result.seconds / result.steps
        life.calibration.observe(event.worker, result)
    for sequence, tokens in result.tokens.items():
        request = life.requests.get(sequence)
        if request is None or not isinstance(request.state, Decode):
            continue
        answer = request.answer
        answer.generated.extend(tokens)
        answer.speculated = answer.speculated.more(*result.speculated.get(sequence, (0, 0)))
        life.ledger.commit(sequence, request.known_tokens)
        if tokens:
            logprobs = tuple(result.logprobs.get(sequence, ()))
            life.command(Delivery(sequence, tuple(tokens), logprobs=logprobs))
        if sequence in result.finished:
            end(life, request, result.finished[sequence], result.errors.get(sequence), settled=True)
