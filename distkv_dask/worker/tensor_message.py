"""Tensors in Dask's own messages: a wrapper that its comms send in any dtype and from any device, without pickle.

Dask's own serialization of torch tensors goes through numpy, which has no bfloat16 and no CUDA. The serializers here
use a tensor's bytes instead; importing this module registers them. Comms that take GPU memory (``ucx://``) ask for
Dask's ``cuda`` family first: CUDA tensors are lent to them as CuPy arrays then, without a copy. Elsewhere their bytes
go through host memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from dask.sizeof import sizeof
from distributed.protocol.cuda import cuda_deserialize, cuda_serialize
from distributed.protocol.pickle import dumps, loads
from distributed.protocol.serialize import dask_deserialize, dask_serialize

from distkv_dask.errors import MissingProgramError


@dataclass(frozen=True, slots=True)
class TensorMessage:
    """Tensors of any dtypes, shapes and devices, and metadata.

    CUDA tensors arrive on the receiver's current CUDA device, or in host memory if it has none. Receivers must not
    write into the tensors: within a process they are the sender's.
    """

    about: Any
    tensors: tuple[torch.Tensor, ...]


def _serialize(message: TensorMessage) -> tuple[dict[str, Any], list[memoryview]]:
    with torch.inference_mode():  # as the tensors were made
        return _header(message), [_bytes_of(one).cpu().numpy().data for one in message.tensors]


def _deserialize(header: dict[str, Any], frames: list[Any]) -> TensorMessage:
    tensors = [_tensor(_on_host(frame), *form) for form, frame in zip(header["tensors"], frames, strict=True)]
    return TensorMessage(loads(header["about"]), tuple(tensors))


def _serialize_cuda(message: TensorMessage) -> tuple[dict[str, Any], list[Any]]:
    """Lend CUDA tensors as CuPy arrays; a message without any is left to the next family."""
    devices = {one.device for one in message.tensors if one.is_cuda}
    if not devices:
        raise NotImplementedError("no CUDA tensors")
    try:
        import cupy
    except ImportError as error:
        raise MissingProgramError("moving GPU memory needs CuPy: pip install 'distkv-dask[gpu]'") from error
    with torch.inference_mode():
        pieces = [_bytes_of(one) for one in message.tensors]
    for device in devices:  # the comm knows nothing of torch's streams
        torch.cuda.synchronize(device)
    return _header(message), [cupy.asarray(one) if one.is_cuda else one.numpy().data for one in pieces]


def _deserialize_cuda(header: dict[str, Any], frames: list[Any]) -> TensorMessage:
    tensors = [
        _tensor(_on_gpu(frame) if hasattr(frame, "__cuda_array_interface__") else _on_host(frame), *form)
        for form, frame in zip(header["tensors"], frames, strict=True)
    ]
    return TensorMessage(loads(header["about"]), tuple(tensors))


def _header(message: TensorMessage) -> dict[str, Any]:
    forms = [(str(one.dtype).removeprefix("torch."), tuple(one.shape), one.is_cuda) for one in message.tensors]
    return {"about": dumps(message.about), "tensors": forms}


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, uint8; copied only if they are not contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _on_host(frame: Any) -> torch.Tensor:
    data = np.frombuffer(frame, np.uint8)
    if not data.size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_numpy(data if data.flags.writeable else data.copy())  # torch warns about read-only memory


def _on_gpu(frame: Any) -> torch.Tensor:
    return torch.as_tensor(frame, device="cuda") if frame.nbytes else torch.empty(0, dtype=torch.uint8, device="cuda")


def _tensor(data: torch.Tensor, dtype: str, shape: tuple[int, ...], was_cuda: bool) -> torch.Tensor:
    """The tensor whose bytes are ``data``."""
    if was_cuda and not data.is_cuda and torch.cuda.is_available():
        data = data.cuda()
    return data.view(getattr(torch, dtype)).view(shape)


def _size(message: TensorMessage) -> int:
    return cast(int, sizeof(message.about)) + sum(one.nbytes for one in message.tensors)


dask_serialize.register(TensorMessage)(_serialize)
dask_deserialize.register(TensorMessage)(_deserialize)
cuda_serialize.register(TensorMessage)(_serialize_cuda)
cuda_deserialize.register(TensorMessage)(_deserialize_cuda)
sizeof.register(TensorMessage)(_size)
