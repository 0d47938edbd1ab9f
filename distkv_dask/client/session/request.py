"""One request at the client: collects its tokens, looks for stop strings, and ends its future."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from dataclasses import replace

from distkv_dask.client.session.choices import chosen_text
from distkv_dask.client.session.embeddings import embedding_of
from distkv_dask.client.session.generation import Generation, Piece
from distkv_dask.client.text_stream import TextStream
from distkv_dask.completion import Completion, Timings
from distkv_dask.errors import DistKVError, EngineClosedError, InvalidRequestError
from distkv_dask.gang import Pooled
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.messages.client_calls import Delivery, Generate
from distkv_dask.models.grammars import grammar_of
from distkv_dask.quotes import Quoting
from distkv_dask.sampling import FinishReason, SamplingParams


class Request:
    """State of a request between submission and completion.

    Parameters
    ----------
    submission
        What is sent to the gManager.
    stream
        Decodes its tokens, and detects stop strings.
    generation
        The user's future.
    on_piece
        Called with each piece of the answer.
    quoting
        Finds its quote in the document, if it has one.
    """

    def __init__(
        self,
        submission: Generate,
        stream: TextStream,
        generation: Generation,
        on_piece: Callable[[Piece], None] | None = None,
        quoting: Quoting | None = None,
    ) -> None:
        self.number = submission.number
        self.submission = submission
        self.generation = generation
        self._on_piece = on_piece
        self._quoting = quoting
        self._stream = stream
        self._told = False
        self._said = 0
        self._logprobs: list[TokenLogprob] = []
        self._scored: dict[int, TokenLogprob] = {}
        self._scores: tuple[float, ...] = ()
        self._pooled: list[Pooled] = []

    def receive(self, delivery: Delivery) -> bool:
        """Receive tokens or the end; returns True when the request has ended."""
        if delivery.error is not None:
            self.generation.timings = delivery.timings or Timings()
            self.fail(delivery.error)
            return True
        if delivery.reason == "cancelled":  # this client did not cancel it
            self.fail(EngineClosedError("the engine was closed before the request ended"))
            return True
        self._logprobs += delivery.logprobs
        self._scores = delivery.scores or self._scores
        self._scored |= enumerate(delivery.scored, delivery.scored_from)
        if delivery.pooled is not None:
            self._pooled.append(delivery.pooled)
        self._say(self._stream.add(delivery.tokens), self._stream.told)
        if delivery.reason is None:
            return False
        self._say(self._stream.finish(), len(self._stream.token_ids))
        try:
            self._complete("stop" if self._stream.stopped else delivery.reason, delivery)
        except DistKVError as error:
            self.fail(error)
        return True

    def wants_stop(self) -> bool:
        """Whether a stop string ended the text while the cluster continues; True once."""
        wants, self._told = self._stream.stopped and not self._told, self._told or self._stream.stopped
        return wants

    def _say(self, text: str, tokens: int) -> None:
        """Hand over text, which ends with the first ``tokens`` tokens."""
        if self._on_piece is None:
            return
        logprobs = tuple(self._logprobs[self._said : tokens])
        self._said = max(self._said, tokens)
        if text or logprobs:
            self._on_piece(Piece(text, logprobs))

    def _complete(self, reason: FinishReason, delivery: Delivery) -> None:
        sampling, tokens = self.submission.sampling, len(self.submission.prompt)
        assert sampling is not None
        scored = None if sampling.prompt_logprobs is None else tuple(self._scored.get(at) for at in range(tokens))
        completion = Completion(
            text=chosen_text(self.submission, self._stream.token_ids, self._stream.text),
            token_ids=tuple(self._stream.token_ids),
            prompt_tokens=tokens,
            finish_reason=reason,
            timings=delivery.timings or Timings(),
            placement=delivery.placement,
            reused_tokens=delivery.reused,
            logprobs=None if sampling.logprobs is None else tuple(self._logprobs[: len(self._stream.token_ids)]),
            prompt_logprobs=scored,
            scores=None if sampling.choices is None else dict(zip(sampling.choices, self._scores, strict=True)),
            quote=None if self._quoting is None else self._quoting.find(self._stream.text),
            embedding=None if sampling.embed is None else embedding_of(self._pooled, tokens, sampling),
        )
        with contextlib.suppress(InvalidStateError):  # it was cancelled
            self.generation.set_result(completion)

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        with contextlib.suppress(InvalidStateError):  # it was cancelled
            self.generation.set_exception(error)


def checked(sampling: SamplingParams | None, tokens: int, window: float, text: str | None = None) -> SamplingParams:
    """Check sampling parameters for a prompt of ``tokens`` tokens, perhaps on a document with the given ``text``.

    Returns them with a seed if they need one, and with the grammar of quotes if the answer quotes.

    Raises
    ------
    InvalidRequestError
        When they are of another type, their schema, regex or grammar cannot be followed, or prompt and answer do not
        fit into the model's ``window`` of tokens.
    """
    sampling = SamplingParams() if sampling is None else sampling
    if not isinstance(sampling, SamplingParams):
        raise InvalidRequestError(f"sampling is {sampling!r:.100}, but must be SamplingParams(...)")
    sampling = sampling.quoting(text)
    if (form := sampling.form) is not None:
        grammar_of(form)
    if tokens + sampling.new_tokens > window:
        answer = f" with max_new_tokens={sampling.max_new_tokens}" if sampling.embed is None else ""
        raise InvalidRequestError(
            f"a prompt of {tokens} tokens{answer} is longer than the model's window of {window} tokens: shorten the "
            f"prompt{' or lower max_new_tokens' if answer else ''}"
        )
    if sampling.seed is None and sampling.temperature > 0:
        return replace(sampling, seed=secrets.randbits(62))
    return sampling
