"""DistAttention in tasks: in each layer the home's forward queries, every member attends, and the home merges.

Plan, kernel and merge are those of :mod:`distkv_dask.worker.home.attention`. Everything else is as simple as possible:
the same few lines at home and holders, one sequence at a time, repeated in each layer. It is a reference for the fast
implementation, which prepares and batches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from distkv_dask.gang import Exchanged
from distkv_dask.kernels import merge_into, merge_sinks, micro_attention
from distkv_dask.worker.asked_layers import asked_layers
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.by_layer.paused import PausedForward
from distkv_dask.worker.first_keys import FirstKeys
from distkv_dask.worker.plan import Part, merge_order
from distkv_dask.worker.tensor_message import TensorMessage


class Asked(NamedTuple):
    """A home's request to its holders in a layer; q, k and v of all the step's tokens are sent with it."""

    layer: int
    scale: float
    parts: dict[str, Part]


def attend_part(pool: Pool, part: Part, question: TensorMessage) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the KV that belongs here, and attend, row by row.

    Parameters
    ----------
    pool
        The worker's pool.
    part
        Its part of the step.
    question
        :class:`Asked`, with q [tokens, heads, head_dim] and twice [tokens, kv_heads, head_dim] of the pool's dtype, in
        host memory or on the pool's device.

    Returns
    -------
    tuple
        float32 out [queries, heads, head_dim] and lse [queries, heads] of the part's own queries.
    """
    put = pool.device.put
    q, k, v = map(put, question.tensors)
    layer, scale, _ = question.about
    partials = []
    first = 0
    for row in part.rows:
        new = put(torch.tensor(part.tokens[first : first + row.queries]))
        first += row.queries
        visible, table = row.length, pool.find(row.sequence, row.spans)
        if row.appends:
            visible += row.queries
            blocks, offsets = put(torch.tensor(pool.slots(table, row.length, visible)))
            pool.write(layer, (blocks, offsets), k[new], v[new])
        tables, lengths, ends, start = (
            put(torch.tensor(values, dtype=torch.int32))
            for values in ([table], [visible], [0, row.queries], [row.length])
        )
        kind = pool.layer_kinds[layer]
        begins = FirstKeys([row], [kind]).tensors.get(kind)
        partials.append(
            micro_attention(
                q[new], pool.keys(layer), pool.values(layer), tables, lengths,
                scale=scale, query_offsets=ends, causal=True, q_start=start,
                first_keys=None if begins is None else put(begins), soft_cap=kind.soft_cap,
            )
        )  # fmt: skip
    return torch.cat([out for out, _ in partials]), torch.cat([lse for _, lse in partials])


class LayerAttention:
    """Called by a model's attention layers if tasks carry queries and partials; used for one step.

    Parameters
    ----------
    forward
        The forward that pauses here.
    parts
        Parts of the step by worker, as :func:`distkv_dask.worker.plan.cut` gives.
    pool
        The home's pool.
    """

    queued = False
    """It waits for tasks."""

    def __init__(self, forward: PausedForward, parts: Mapping[str, Part], pool: Pool) -> None:
        self._waiting = 0.0
        self._forward = forward
        self._parts = dict(parts)
        self._order = merge_order(parts)
        self._remote = {worker: part for worker, part in parts.items() if worker != forward.gang.home}
        self._asked = {worker: asked_layers(part.rows, pool.layer_kinds) for worker, part in self._remote.items()}
        self._pool = pool

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of one layer, as :meth:`distkv_dask.worker.home.attention.DistAttention.attend`.

        Raises
        ------
        ChannelTimeoutError
            The partials do not come in time.
        GangAbortedError
            The gang was aborted.
        """
        asked = Asked(layer, scale, {one: part for one, part in self._remote.items() if layer in self._asked[one]})
        self._forward.ask(layer, TensorMessage(asked, (q.cpu(), k.cpu(), v.cpu())))  # tasks carry host memory
        answers: dict[str, tuple[torch.Tensor, ...]] = {}
        home = self._forward.gang.home
        if home in self._parts:
            answers[home] = attend_part(self._pool, self._parts[home], TensorMessage(asked, (q, k, v)))
        began = time.perf_counter()
        put = self._pool.device.put
        answers |= {
            message.about: tuple(map(put, message.tensors)) for message in self._forward.wait_for_answers(layer)
        }
        self._waiting += time.perf_counter() - began
        out = torch.zeros(*q.shape[:2], self._pool.value_dim, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        for worker, query, token, count in self._order:
            if worker not in answers:
                continue
            into, of = slice(token, token + count), slice(query, query + count)
            part_out, part_lse = answers[worker]
            merge_into(out[into], lse[into], part_out[of], part_lse[of])
        if sinks is not None:
            merge_sinks(out, lse, sinks)
        return out.to(q.dtype)

    @property
    def exchanged(self) -> Exchanged:
        """Bytes exchanged over channels so far: none, because Dask's tasks carry them."""
        return Exchanged(waiting=self._waiting)

    def advance(self) -> None:
        """Nothing: each layer is planned again, and a window is one step long."""

    def close(self) -> None:
        """Nothing is open."""
