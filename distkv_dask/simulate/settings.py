"""The state machine of a simulated cluster: the configuration, and the model that its policy decides by."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count

from distkv_dask.config import Config
from distkv_dask.scheduler.costs.model import PerformanceModel
from distkv_dask.scheduler.costs.presets import Preset
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.scheduler.records.machine_state import MachineState

BLOCK_TOKENS = 64
BATCH = 256
"""Sequences that one instance decodes together (vLLM's default)."""
CHUNK_SECONDS = 0.25
"""Minimum time of a prompt's first chunk: on faster workers, chunks are larger than configured."""


def machine(preset: Preset, policy: str, *, prefill: bool) -> Lifecycle:
    """The state machine, without workers.

    Parameters
    ----------
    preset
        Model and worker.
    policy
        A policy's name.
    prefill
        False if prompts cost nothing: they come with their KV, and the policy knows it.
    """
    config = Config.load(block_tokens=BLOCK_TOKENS, window_batch=BATCH)
    fast = int(CHUNK_SECONDS / preset.model.curve.prompt) // BLOCK_TOKENS * BLOCK_TOKENS
    config = replace(
        config,
        policy=policy,
        prefill_chunk_tokens=max(config.prefill_chunk_tokens, fast if prefill else preset.kv_tokens),
        timeout_start=math.inf,  # no simulated worker is silent: work takes long only because the model says so
        timeout_receive=math.inf,
    )
    state = MachineState("simulated", config, count(), block_bytes=BLOCK_TOKENS * preset.model.shape.kv_bytes)
    state.know_costs(preset.model if prefill else without_prefill(preset.model))
    return Lifecycle(state)


def without_prefill(model: PerformanceModel) -> PerformanceModel:
    """The same model, in which prompts cost nothing."""
    return replace(model, curve=replace(model.curve, prompt=0.0, pair=0.0))
