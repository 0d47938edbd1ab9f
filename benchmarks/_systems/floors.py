"""The machine's limits: its rates in one run, and the time that each case's arithmetic and reads take at them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from _systems.cases import Case
from distkv_dask.kernels import advise_huge_pages, native_kernel

NUMBER = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates of all cores together: bytes read per second, bfloat16 operations of large matrix products per second."""

    read: float
    gemm: float

    def faster(self, other: Machine) -> Machine:
        """The higher of both rates: if something slowed a measurement, that is not a limit of the machine."""
        return Machine(max(self.read, other.read), max(self.gemm, other.gemm))


def measure(threads: int, size: int = 1 << 27, side: int = 2048) -> Machine:
    """Read ``size`` 8-byte numbers, and multiply square matrices, for about a second each; the best of each counts."""
    torch.set_num_threads(threads)
    memory = torch.empty(size, dtype=torch.int64)
    advise_huge_pages(memory)
    memory.fill_(1)
    a, b = torch.randn(2, side, side).bfloat16()
    native = native_kernel.missing() is None
    read = _best(lambda: native_kernel.read_memory(memory, threads) if native else memory.sum())
    return Machine(size * 8 / read, 2 * side**3 / _best(lambda: a @ b))


def _best(run: Callable[[], object]) -> float:
    best, until = math.inf, time.perf_counter() + 1
    while (began := time.perf_counter()) < until:
        run()
        best = min(best, time.perf_counter() - began)
    return best


@dataclass(frozen=True, slots=True)
class Model:
    """Parameters in the layers' linears and in the head, and the attention's shape."""

    linears: int
    head: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's KV in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * NUMBER

    @classmethod
    def of(cls, config: Any) -> Model:
        """Create it from the configuration of a Llama."""
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        layer = hidden * head_dim * 2 * (heads + kv_heads) + 3 * hidden * config.intermediate_size
        layers = config.num_hidden_layers
        return cls(layer * layers, hidden * config.vocab_size, layers, heads, kv_heads, head_dim)


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds until all answers have their first token, and of a decode step of all of them together."""

    first: float
    step: float


def floor(model: Model, machine: Machine, case: Case) -> Floor:
    """Time that a case would take if only its matrix products and its reads of weights and KV took time."""
    operations = _prompt(model, len(case.document), 0) if case.document else 0.0
    for prompt in case.prompts:
        operations += _prompt(model, len(prompt), len(case.document)) + 2 * model.head
    rows, own = len(case.prompts), sum(map(len, case.prompts)) + len(case.prompts) * case.new / 2
    read = (model.linears + model.head) * NUMBER + (len(case.document) + own) * model.kv_bytes
    attended = len(case.document) * rows + own
    step = 2 * rows * (model.linears + model.head) + 4 * model.heads * model.head_dim * model.layers * attended
    return Floor(operations / machine.gemm, max(read / machine.read, step / machine.gemm))


def _prompt(model: Model, tokens: int, before: int) -> float:
    """Operations of a prompt's linears and attention, after ``before`` tokens whose KV is already stored."""
    pairs = tokens * before + tokens * (tokens + 1) / 2
    return 2.0 * model.linears * tokens + 4.0 * model.heads * model.head_dim * model.layers * pairs
