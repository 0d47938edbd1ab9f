"""A step's exchange in Python: over channels of any kind, for a home on any device."""

from __future__ import annotations

import math
import selectors
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from distkv_dask.gang import Exchanged
from distkv_dask.kernels import PreparedMerge
from distkv_dask.worker.asked_layers import asked_layers
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.device import Mark, Pair
from distkv_dask.worker.home.exchange import Asking, bytes_of, late, placed_indices
from distkv_dask.worker.plan import Part, Run


class PythonExchange:
    """See :class:`distkv_dask.worker.home.exchange.Exchange`.

    On a card, questions are packed there and copied to the host while the local part is computed. The host queues the
    local part first and then waits for the questions: it waits once per layer.
    """

    def __init__(self, asking: Asking) -> None:
        self._packed: tuple[Mark, float] | None = None
        self._sending = self._waiting = 0.0
        self._bytes_out = self._bytes_in = 0
        self._asked: list[Remote] = []
        self._asking = asking
        self._remotes = [Remote(channel, asking, part) for _, channel, part in asking.holders]
        self._questions, self._answers = self._buffers(asking)
        remotes = dict(zip((worker for worker, _, _ in asking.holders), self._remotes, strict=True))
        self._merges: list[tuple[Remote | None, Callable[[], None]]] = []
        if asking.together is None:
            partials = {worker: remote.partials for worker, remote in remotes.items()}
            if asking.local is not None:
                partials[asking.gang.home] = asking.local
            merges = merging(asking.order, asking.out, asking.lse, partials)
            self._merges = [(remotes.get(worker), merge) for worker, merge in merges]
        self._selector = selectors.DefaultSelector() if len(self._remotes) > 1 else None
        if self._selector is not None:
            for remote in self._remotes:
                self._selector.register(remote.channel, selectors.EVENT_READ, remote)

    def _buffers(self, asking: Asking) -> tuple[Pair, Pair]:
        """Memory of all questions and of all answers; each holder has a piece of it."""
        device, dtype = asking.pool.device, asking.pool.dtype
        questions = device.pair((sum(one.question_size for one in self._remotes),), dtype)
        size = sum(one.answer_size for one in self._remotes)
        answers = device.pair((size,), torch.float32) if asking.memory is None else device.mirror(asking.memory)
        asked = answered = 0
        for one in self._remotes:
            question, answer = slice(asked, asked + one.question_size), slice(answered, answered + one.answer_size)
            one.place(
                Pair(questions.host[question], questions.there[question]),
                Pair(answers.host[answer], answers.there[answer]),
            )
            asked, answered = question.stop, answer.stop
        return questions, answers

    @property
    def exchanged(self) -> Exchanged:
        """What was exchanged so far."""
        return Exchanged(self._sending, self._waiting, self._bytes_out, self._bytes_in)

    def ask(self, layer: int, step: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """Send the queries, and the KV of tokens that belong to tails elsewhere."""
        began, device = time.perf_counter(), self._asking.pool.device
        self._asked = [remote for remote in self._remotes if layer in remote.layers]
        for remote in self._asked:
            remote.pack(q, k, v)
            if device.is_host:
                self._ask(remote, layer, step, scale)
        if self._asked and not device.is_host:
            self._questions.down()
            self._packed = device.mark(), scale
        self._sending += time.perf_counter() - began
        self._bytes_out += sum(remote.asked_bytes for remote in self._asked)
        if self._asking.together is None:
            self._asking.out.zero_()
            self._asking.lse.fill_(-torch.inf)

    def gather(self, layer: int, step: int) -> None:
        """Wait for the partials of all holders, and merge each as soon as all earlier ones in order have arrived."""
        self._ask_packed(layer, step)
        there: set[Remote | None] = {None}  # the home's own
        merges = [(remote, merge) for remote, merge in self._merges if remote is None or remote in self._asked]
        merged = 0
        while True:
            while merged < len(merges) and merges[merged][0] in there:
                self._merge(*merges[merged], layer, step)
                merged += 1
            if len(there) > len(self._asked):
                break
            for remote in self._arrived(there, layer, step):
                self._wait(remote, layer, step)
                there.add(remote)
        if self._asking.together is not None:
            self._take_up()
            self._merge(None, self._asking.together, layer, step)

    def _take_up(self) -> None:
        """Copy a layer's partials to the card; those of holders that were not asked are empty partials there."""
        if self._asked:
            self._answers.up()
        for remote in self._remotes:
            if remote not in self._asked:
                out, lse = remote.partials
                out.zero_()
                lse.fill_(-torch.inf)

    def _ask_packed(self, layer: int, step: int) -> None:
        """Send the questions that are still being copied from the device."""
        if self._packed is None:
            return
        began = time.perf_counter()
        (mark, scale), self._packed = self._packed, None
        mark.wait()
        for remote in self._asked:
            self._ask(remote, layer, step, scale)
        self._sending += time.perf_counter() - began

    def _arrived(self, there: set[Remote | None], layer: int, step: int) -> list[Remote]:
        """Holders whose partials have begun to arrive."""
        if self._selector is None:
            return self._asked
        events = self._select(self._selector, layer, step)
        if not events:
            raise late({one.channel.peer for one in self._asked if one not in there}, self._asking.limit)
        return [key.data for key, _ in events]

    def close(self) -> None:
        """Forget the channels."""
        if self._selector is not None:
            self._selector.close()

    # A layer's parts, separate so that a trace can record each (:mod:`distkv_dask.worker.home.traced`)

    def _ask(self, remote: Remote, layer: int, step: int, scale: float) -> None:
        remote.ask(layer, step, scale)

    def _select(
        self, selector: selectors.BaseSelector, layer: int, step: int
    ) -> list[tuple[selectors.SelectorKey, int]]:
        began = time.perf_counter()
        events = selector.select(self._asking.limit)
        self._waiting += time.perf_counter() - began
        return events

    def _wait(self, remote: Remote, layer: int, step: int) -> None:
        began = time.perf_counter()
        remote.receive(layer, step)
        self._bytes_in += remote.answer_bytes
        self._waiting += time.perf_counter() - began

    def _merge(self, remote: Remote | None, merge: Callable[[], None], layer: int, step: int) -> None:
        merge()


class Remote:
    """One holder's part of a step, seen from the home; only :class:`PythonExchange` and its trace use it."""

    def __init__(self, channel: Channel, asking: Asking, part: Part) -> None:
        self.channel = channel
        pool, gang = asking.pool, asking.gang
        tokens, heads, dv = asking.out.shape
        self.layers = frozenset(asked_layers(part.rows, pool.layer_kinds))
        """Layers in which it is asked."""
        self._index, self._appended, appended = placed_indices(part, tokens, pool.device)
        self._gang, self._epoch = gang.number, gang.epoch
        self._q_shape = len(part.tokens), heads, pool.head_dim
        self._out_shape = len(part.tokens), heads, dv
        self._kv_shape = pool.planes, appended, pool.kv_heads, pool.head_dim
        self.question_size = math.prod(self._q_shape) + math.prod(self._kv_shape)
        """Elements of a question, in the pool's dtype."""
        self.answer_size = len(part.tokens) * heads * (dv + 1)
        """Elements of a partial, in float32."""

    def place(self, question: Pair, answer: Pair) -> None:
        """Use this memory."""
        elements = math.prod(self._q_shape)
        self._q = question.there[:elements].view(self._q_shape)
        self._kv = question.there[elements:].view(self._kv_shape)
        self._question, self._answer = bytes_of(question.host), bytes_of(answer.host)
        elements = math.prod(self._out_shape)
        self.partials = answer.there[:elements].view(self._out_shape), answer.there[elements:].view(self._out_shape[:2])
        """What was received, on the device: float32 [queries, heads, value_dim] and [queries, heads]."""

    @property
    def asked_bytes(self) -> int:
        """Bytes of a question."""
        return len(self._question)

    @property
    def answer_bytes(self) -> int:
        """Bytes of a partial."""
        return len(self._answer)

    def pack(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put the queries into the question, and the KV of tokens that belong to a tail there."""
        _copy_rows(q, self._index, self._q)
        if self._kv_shape[1]:
            for tensor, there in zip((k, v), self._kv, strict=False):  # if values are a part of the keys, keys alone
                _copy_rows(tensor, self._appended, there)

    def ask(self, layer: int, step: int, scale: float) -> None:
        """Send the question, which is packed."""
        question = self._question
        header = Header(Kind.ATTEND, self._gang, self._epoch, layer, step, len(question), scale)
        self.channel.send(header, question)

    def receive(self, layer: int, step: int) -> None:
        """Wait for the partial."""
        answer = self._answer
        self.channel.recv_into(Header(Kind.PARTIAL, self._gang, self._epoch, layer, step, len(answer)), answer)


def merging(
    order: Sequence[Run], out: torch.Tensor, lse: torch.Tensor,
    partials: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> list[tuple[str, PreparedMerge]]:  # fmt: skip
    """What merges partials into ``out`` and ``lse``, in order, each with its worker."""
    merges = []
    for worker, query, token, count in order:
        into, of = slice(token, token + count), slice(query, query + count)
        part_out, part_lse = partials[worker]
        merges.append((worker, PreparedMerge(out[into], lse[into], part_out[of], part_lse[of])))
    return merges


def _copy_rows(tensor: torch.Tensor, index: torch.Tensor | None, taken: torch.Tensor) -> None:
    """Copy a tensor, or the rows of it that ``index`` names."""
    if index is None:
        taken.copy_(tensor)
    else:
        torch.index_select(tensor, 0, index, out=taken)
