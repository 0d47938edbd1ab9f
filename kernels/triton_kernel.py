"""MicroAttention on GPUs by the Triton kernels: whether they support a pool, and a single call."""

from __future__ import annotations

import importlib

import torch

from .contract import Call
from .index import Index
from .triton_batch import TritonBatch

LARGEST_HEAD_DIM = 256


def unsupported(device_type: str, block_tokens: int, head_dim: int) -> str | None:
    """Why Triton cannot serve pools on a device, or None if it can."""
    if device_type != "cuda":
        return f"Triton serves GPUs, not {device_type}"
    if block_tokens & (block_tokens - 1):
        return f"Triton needs blocks of a power of two tokens, not {block_tokens}"
    if head_dim > LARGEST_HEAD_DIM:
        return f"Triton's tiles hold heads of up to {LARGEST_HEAD_DIM} values, not {head_dim}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed ({error}); install distkv-dask[gpu]"
    return None


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend on a GPU (or in Triton's interpreter); see :func:`distkv_dask.kernels.micro_attention`.

    Index tensors on a GPU are read once; :class:`distkv_dask.kernels.PreparedAttention` never reads the device.
    """
    out, lse = call.empty_result()
    index = Index(call.block_tables, call.lengths, call.query_offsets, call.q_start, call.first_keys)
    batch = TritonBatch(call, index, out, lse)
    batch.attend(call.q, call.k_pool, call.v_pool, call.scale, (call.k_scales, call.v_scales))
    return out, lse
