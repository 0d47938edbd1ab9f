"""Tensors as results of Dask tasks: a wrapper that Dask's comms carry in any dtype, without a pickle of the data.

Dask's own serialisation of torch tensors goes through numpy, which has no bfloat16. The serializer pair here looks at a
tensor's bytes instead; importing this module registers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from dask.sizeof import sizeof
from distributed.protocol.pickle import dumps, loads
from distributed.protocol.serialize import dask_deserialize, dask_serialize


@dataclass(frozen=True, slots=True)
class Parcel:
    """CPU tensors of any dtypes and shapes, and what is to be known about them.

    Who takes a parcel does not write into its tensors: within a process they are the sender's.
    """

    about: Any
    tensors: tuple[torch.Tensor, ...]


def _serialize(parcel: Parcel) -> tuple[dict[str, Any], list[memoryview]]:
    header = {
        "about": dumps(parcel.about),
        "tensors": [(str(one.dtype).removeprefix("torch."), tuple(one.shape)) for one in parcel.tensors],
    }
    with torch.inference_mode():  # as the tensors were made
        frames = [one.contiguous().view(-1).view(torch.uint8).numpy().data for one in parcel.tensors]
    return header, frames


def _deserialize(header: dict[str, Any], frames: list[Any]) -> Parcel:
    tensors = [_tensor(frame, *form) for form, frame in zip(header["tensors"], frames, strict=True)]
    return Parcel(loads(header["about"]), tuple(tensors))


def _tensor(frame: Any, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    data = np.frombuffer(frame, np.uint8)
    if not data.size:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    data = data if data.flags.writeable else data.copy()  # torch warns of tensors over memory that is not
    return torch.from_numpy(data).view(getattr(torch, dtype)).view(shape)


def _bytes(parcel: Parcel) -> int:
    return cast(int, sizeof(parcel.about)) + sum(one.nbytes for one in parcel.tensors)


dask_serialize.register(Parcel)(_serialize)
dask_deserialize.register(Parcel)(_deserialize)
sizeof.register(Parcel)(_bytes)
