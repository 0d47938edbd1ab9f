"""llama.cpp through its C interface: prompts one after the other or in one batch, then all answers decode together."""

from __future__ import annotations

import ctypes
import time
from itertools import islice
from typing import Any

import llama_cpp
import numpy as np

BATCH = 2048
"""Maximum tokens of a call; llama.cpp cuts them into pieces of 512."""

Row = tuple[int, int, int, bool]
"""Token, position, sequence, and whether its logits are needed."""


class System:
    """A model of llama.cpp on all threads; each case has its own context, as large as it needs."""

    def __init__(self, settings: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(settings["gguf"].encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {settings['gguf']}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads, self._most = settings["threads"], settings["pool_tokens"]
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.about = f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), {settings['gguf'].rpartition('-')[2]}"

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_model_free(self._model)

    def answer(self, prompts: list[list[int]], new: int, document: list[int], speculate: bool) -> dict[str, Any]:
        """Seconds in all, and until each answer's first and last token."""
        longest = len(document) + max(map(len, prompts)) + new
        context = self._context(longest, len(prompts), shared=bool(document))
        try:
            return self._answer(context, prompts, new, document)
        finally:
            llama_cpp.llama_free(context)

    def _context(self, longest: int, sequences: int, shared: bool) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = longest + 256 * sequences if shared else sequences * (-(-longest // 256) * 256)
        if self._most is not None:
            parameters.n_ctx = min(parameters.n_ctx, self._most)
        parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = BATCH, 512, sequences
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.kv_unified = shared
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context of {parameters.n_ctx} tokens")
        return context

    def _answer(self, context: Any, prompts: list[list[int]], new: int, document: list[int]) -> dict[str, Any]:
        began, shared = time.perf_counter(), 0.0
        if document:
            self._compute(context, [(token, at, 0, False) for at, token in enumerate(document)])
            memory = llama_cpp.llama_get_memory(context)
            for sequence in range(1, len(prompts)):
                llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
            shared = time.perf_counter() - began
        start, tokens, firsts = len(document), [list[int]() for _ in prompts], list[float]()
        for group in self._groups(prompts):
            rows = [
                (token, start + at, sequence, at + 1 == len(prompts[sequence]))
                for sequence in group for at, token in enumerate(prompts[sequence])
            ]  # fmt: skip
            for sequence, token in zip(group, self._compute(context, rows), strict=True):
                tokens[sequence].append(token)
                firsts.append(time.perf_counter() - began)
        for step in range(new - 1):
            rows = [(tokens[one][-1], start + len(prompt) + step, one, True) for one, prompt in enumerate(prompts)]
            for one, token in enumerate(self._compute(context, rows)):
                tokens[one].append(token)
        seconds = time.perf_counter() - began
        ends = [seconds] * len(prompts)
        return {"seconds": seconds, "shared": shared, "firsts": firsts, "ends": ends, "tokens": tokens}

    def _groups(self, prompts: list[list[int]]) -> list[list[int]]:
        """Sequences whose prompts fit into one call, in order."""
        groups: list[list[int]] = []
        room = 0
        for sequence, prompt in enumerate(prompts):
            if len(prompt) > room:
                groups.append([])
                room = BATCH
            groups[-1].append(sequence)
            room -= len(prompt)
        return groups

    def _compute(self, context: Any, rows: list[Row]) -> list[int]:
        """The most likely next token of each row that needs its logits."""
        found, left = [], iter(rows)
        while some := list(islice(left, BATCH)):
            batch = self._batch
            batch.n_tokens = len(some)
            for at, (token, position, sequence, wanted) in enumerate(some):
                batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            if status := llama_cpp.llama_decode(context, batch):
                room = llama_cpp.llama_n_ctx(context)
                raise RuntimeError(f"llama_decode returned {status} (1: its context of {room} tokens is full)")
            for at, row in enumerate(some):
                if row[3]:
                    logits = llama_cpp.llama_get_logits_ith(context, at)
                    pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
                    found.append(int(np.ctypeslib.as_array(pointer, (self._vocabulary,)).argmax()))
        return found
