"""CUDA tensors, bfloat16 too, cross Dask's comms: without a copy if the comm takes GPU memory, or over the host."""

from __future__ import annotations

import pytest
import torch
from distributed.protocol import deserialize, serialize

from distkv_dask.worker.tensor_message import TensorMessage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]


def message(device: str = "cuda") -> TensorMessage:
    torch.manual_seed(0)
    block = torch.randn(30, 2, 3, 64, 64, device=device).bfloat16()
    return TensorMessage({"blocks": (1, 2)}, (block, block[:, :, ::2], torch.empty(0, device=device), torch.arange(3)))


def assert_same(got: TensorMessage, sent: TensorMessage) -> None:
    assert got.about == sent.about
    for arrived, left in zip(got.tensors, sent.tensors, strict=True):
        assert (arrived.dtype, arrived.shape, arrived.device) == (left.dtype, left.shape, left.device)
        assert torch.equal(arrived, left)


def test_gpu_memory_is_lent_without_a_copy_as_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed (extra: gpu)")
    sent = message()
    header, frames = serialize(sent, serializers=("cuda", "dask", "pickle"))
    assert header["serializer"] == "cuda"
    assert isinstance(frames[0], cupy.ndarray)
    assert frames[0].data.ptr == sent.tensors[0].data_ptr()
    got = deserialize(header, frames)
    assert got.tensors[0].data_ptr() == sent.tensors[0].data_ptr()
    assert_same(got, sent)


def test_over_host_memory_tensors_come_back_to_the_gpu() -> None:
    sent = message()
    header, frames = serialize(sent, serializers=("dask", "pickle"))
    assert header["serializer"] == "dask"
    assert_same(deserialize(header, frames), sent)
