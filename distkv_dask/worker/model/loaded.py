"""A Hugging Face causal language model whose attention is DistAttention.

The model's own forward runs on flattened tokens ``[1, T]`` with explicit positions, and every layer hands its queries,
keys and values to the :class:`AttentionStep` of the call (:mod:`distkv_dask.worker.model.hook`). Families, weights and
quantized files are handled by transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from distkv_dask.adapter import Adapter
from distkv_dask.geometry import Geometry
from distkv_dask.placement import Stage
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.model.adapters import Adapters
from distkv_dask.worker.model.captured import CapturedForward, why_not_captured
from distkv_dask.worker.model.cut import stage_forward
from distkv_dask.worker.model.decoder_layers import use_core
from distkv_dask.worker.model.hidden_states import HiddenStates
from distkv_dask.worker.model.hook import AttentionStep, attending_with
from distkv_dask.worker.model.lora import PlacedAdapter
from distkv_dask.worker.model.no_attention import NoAttention
from distkv_dask.worker.model.packed import Choice, linears_of, pack_linears, packable_bytes, packed_by
from distkv_dask.worker.model.packed_file import map_packed
from distkv_dask.worker.model.read_weights import Weights
from distkv_dask.worker.model.recurrent import Past, State
from distkv_dask.worker.model.structured import Follower, Grammars

__all__ = ["AttentionStep", "Geometry", "LoadedModel"]

Repeated = Callable[[], Tensor]

LEAST_STEPS = 6
"""Minimum steps for which a capture pays: it takes as long as one or two steps that Python launches."""


class LoadedModel:
    """Weights of one model in this process, ready to run with any :class:`AttentionStep`.

    Parameters
    ----------
    model
        A transformers causal LM with the attention implementation ``"distkv"``.
    geometry
        Its sizes.
    eos_token_ids
        Tokens that end a sequence.
    tokenizer
        Loads its tokenizer, or None where it has none; called for answers that follow a grammar only.
    weights
        Where its weights are.
    """

    def __init__(
        self,
        model: Any,
        geometry: Geometry,
        eos_token_ids: frozenset[int],
        tokenizer: Callable[[], Any | None],
        weights: Weights,
    ) -> None:
        self.device = weights.device
        self.weights = weights
        self._model = model
        self._hidden_states = HiddenStates(model)
        self.geometry = geometry
        self.eos_token_ids = eos_token_ids
        self.is_packed = False
        """Whether :meth:`pack` found room."""
        self._packed_in: Path | None = None
        self._packing = threading.Lock()
        self._core_layers = 0
        self._grammars = Grammars(tokenizer, eos_token_ids, geometry.vocab_size)
        self.adapters = Adapters(model, weights.device.torch)
        """Its adapters."""
        self.stage: Stage | None = None
        """The stage to whose layers it was cut down, if it was; ``geometry`` is then of these layers alone."""
        self.whole = geometry
        """Sizes of the model with all its layers."""
        self.uncaptured = "the host has no graphs"
        """Why steps on a card are not captured in CUDA graphs; empty if they are."""

    def pack(self, room: int, rows: int, choose: Callable[[], Choice]) -> None:
        """Pack weights to compute faster with few rows.

        Parameters
        ----------
        room
            Maximum bytes of a private copy. If it would take more, packed weights are mapped from a file.
        rows
            Most rows that are usually computed at once, as :func:`map_packed` takes them.
        choose
            Chooses the products; called only if weights can be packed.
        """
        with self._packing:  # engines that open at the same time share the model
            if self.is_packed or self.weights.disk is not None:
                return
            if packable_bytes(self._model) <= room:
                self.is_packed = pack_linears(self._model, room, choose) > 0
            else:
                self._packed_in = map_packed(self._model, room, rows, choose, (self.weights.files, self.fingerprint))
                self.is_packed = self._packed_in is not None
            self._core_layers = use_core(self._model) if self.is_packed else 0

    def is_prepared(self, sampling: SamplingParams | None, adapter: Adapter | None = None) -> bool:
        """Whether :meth:`follower` and :meth:`adapter` do not have to compile a grammar or read an adapter first."""
        form = None if sampling is None else sampling.form
        ready = form is None or self._grammars.is_prepared(form)
        return ready and (adapter is None or self.adapters.is_prepared(adapter))

    def prepare(self, sampling: SamplingParams | None, adapter: Adapter | None = None) -> None:
        """Compile the grammar of an answer, and read an adapter; takes seconds, on any thread, and raises nothing."""
        if adapter is not None:
            self.adapters.prepare(adapter)
        if sampling is not None and (form := sampling.form) is not None:
            self._grammars.prepare(form)

    def follower(self, sampling: SamplingParams, generated: Iterable[int] = ()) -> Follower | None:
        """Follow the schema, regex or grammar of an answer, if it has one, from after the tokens ``generated``."""
        return None if (form := sampling.form) is None else self._grammars.follow(form, generated)

    def adapter(self, adapter: Adapter | None) -> PlacedAdapter | None:
        """An adapter for forwards on the home lane, which calls this; raises as :meth:`Adapters.get` does."""
        return None if adapter is None else self.adapters.get(adapter, self._try_tokens)

    @property
    def where(self) -> str:
        """Where its weights are, in words."""
        by = packed_by(self._model) if self.is_packed else ""
        packed = f"; those of linears also packed, which takes as much memory of this process alone: {by}"
        if self._packed_in is not None:
            left = len(linears_of(self._model))
            but = f" (but {left}, which would be in memory twice)" if left else ""
            packed = f"; those of linears{but} packed, mapped from {self._packed_in}: {by}"
        layers = f"; {self._core_layers} layers computed in C++ with as many rows"
        return self.weights.where + packed * self.is_packed + layers * (self._core_layers > 0)

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return self.weights.fingerprint

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(self._model.num_parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights in memory."""
        whole: int = sum(weight.nbytes for weight in self._model.parameters())
        return whole if self.weights.disk is None else whole - self.weights.disk.saved_bytes

    def past(self, states: Sequence[State]) -> Past:
        """States from which the recurrent layers of a forward continue: one per sequence, none for a new one."""
        return Past(self._model.config.get_text_config(), states)

    def state_of_a_token(self) -> State:
        """State of a sequence of one token, whose tensors have the sizes of all; empty without recurrent layers."""
        past = self._try_tokens(1) if self.geometry.state_bytes else None
        return {} if past is None else past.state(0)

    def _try_tokens(self, count: int) -> Past | None:
        """Run a new sequence of some tokens without attention; returns its states, if there are recurrent layers."""
        past = self.past([{}]) if self.geometry.state_bytes else None
        tokens = torch.arange(count, device=self.device.torch)
        self.forward(tokens, tokens, NoAttention(self.geometry.value_dim), None, past)
        self.device.finish()
        return past

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        step: AttentionStep,
        keep: Tensor | None = None,
        past: Past | None = None,
        take_hidden: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Run the model over flattened tokens of any number of sequences.

        Parameters
        ----------
        token_ids, positions
            int64 [T] on the device: the tokens, and the position of each in its sequence.
        step
            Attends in each layer; only it knows which token belongs to which sequence.
        keep
            int64 [n] on the device, maybe empty: indices of the flattened tokens whose logits are computed; None means
            all.
        past
            For a model with recurrent layers: the states of the sequences, each with the same number of tokens; after
            the call, those after the tokens. ``keep`` is for one sequence only.
        take_hidden
            Called with the hidden states [T, size] of all tokens after the model's last norm.

        Returns
        -------
        Tensor
            float32 [n, vocab] on the device.
        """
        # never a number n: transformers takes the last n rows as a view, for which torch 2.13 copies the whole lm_head
        some: Tensor | int = 0 if keep is None else keep
        rows = 1 if past is None else past.rows
        taken = self._hidden_states.taken(take_hidden)
        with torch.inference_mode(), attending_with(step, positions, self.geometry), taken:
            output = self._model(
                input_ids=token_ids.view(rows, -1),
                position_ids=positions.view(rows, -1),
                past_key_values=past,
                use_cache=past is not None,
                logits_to_keep=some,
            )
            return cast(Tensor, output.logits.flatten(0, 1).float())

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return cast(torch.dtype, self._model.dtype)

    @property
    def hidden_size(self) -> int:
        """Size of a token's hidden state."""
        return int(self._model.config.get_text_config().hidden_size)

    def further(self, hidden: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Hidden states [T, size] after the layers of a further stage; others are as :meth:`forward` takes them."""
        with attending_with(step, positions, self.geometry):
            return stage_forward(self._model, hidden, positions)

    def repeated(self, inputs: Tensor, step: AttentionStep, queued: bool, past: Past | None, steps: int) -> Repeated:
        """The forward of similar steps, called once per step.

        Parameters
        ----------
        inputs
            int64 [2, T] on the device: tokens and positions, as :meth:`forward` takes them, of the next step.
        step
            Attends, always in the same memory.
        queued
            Whether that only queues work on the device.
        past
            As :meth:`forward` takes it.
        steps
            Maximum number of steps.
        """

        def forward(attention: AttentionStep) -> Tensor:
            return self.forward(inputs[0], inputs[1], attention, None, past)

        if self.uncaptured or steps < LEAST_STEPS:
            return partial(forward, step)
        return CapturedForward(self.device, forward, step, queued)

    def try_capture(self) -> None:
        """Test whether steps can be captured in CUDA graphs, on the thread and stream that will run them."""
        if self.geometry.state_bytes:
            self.uncaptured = "recurrent layers make new states in every step"
            return
        one = torch.zeros(1, dtype=torch.int64, device=self.device.torch)
        self.uncaptured = why_not_captured(self.device, partial(self.forward, one, one), self.geometry)
