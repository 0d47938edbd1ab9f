"""Tensors, including bfloat16, arrive unchanged over every comm of Dask, and none of their bytes are pickled."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import pytest
import torch
from dask.sizeof import sizeof
from distributed.comm import connect, listen
from distributed.protocol import deserialize, serialize, to_serialize

from distkv_dask.worker.tensor_message import TensorMessage

needs_ucxx = pytest.mark.skipif(
    importlib.util.find_spec("distributed_ucxx") is None, reason="distributed-ucxx is not installed (extra: ucx)"
)
COMMS = [
    pytest.param("tcp://127.0.0.1:0", id="tcp"),
    pytest.param("ucx://127.0.0.1:0", id="ucx", marks=[pytest.mark.ucx, needs_ucxx]),
]


def tensors() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    block = torch.randn(30, 2, 3, 64, 64).bfloat16()
    return (
        block,
        block.transpose(2, 3)[:, :, ::2],  # not contiguous
        torch.randn(1, 9, 65),
        torch.empty(0, 3, dtype=torch.bfloat16),
        torch.tensor(7.0, dtype=torch.float16),
        torch.arange(5, dtype=torch.int32),
    )


def assert_same(got: TensorMessage, sent: TensorMessage) -> None:
    assert got.about == sent.about
    assert len(got.tensors) == len(sent.tensors)
    for arrived, left in zip(got.tensors, sent.tensors, strict=True):
        assert (arrived.dtype, arrived.shape) == (left.dtype, left.shape)
        assert torch.equal(arrived.cpu(), left.cpu())


@pytest.mark.parametrize("address", COMMS)
def test_a_message_of_tensors_crosses_a_comm_as_it_was_sent(address: str) -> None:
    sent = TensorMessage({"sequence": 3, "blocks": (1, 2)}, tensors())

    async def echo(comm: Any) -> None:
        message = await comm.read()
        await comm.write({"back": to_serialize(message["there"])})
        await comm.close()

    async def cross() -> TensorMessage:
        async with listen(address, echo) as listener:
            comm = await connect(listener.contact_address)
            await comm.write({"there": to_serialize(sent)})
            answer = await comm.read()
            await comm.close()
            return answer["back"]

    assert_same(asyncio.run(cross()), sent)


def test_bytes_are_lent_to_the_comm_and_not_copied() -> None:
    message = TensorMessage(None, tensors()[:1])
    header, (frame,) = serialize(message, serializers=("cuda", "dask", "pickle"))
    assert header["serializer"] == "dask"
    torch.frombuffer(frame, dtype=torch.bfloat16)[0] = 42.0
    assert message.tensors[0].view(-1)[0] == 42.0
    got = deserialize(header, [frame])
    assert got.tensors[0].data_ptr() == message.tensors[0].data_ptr()


def test_what_arrives_in_read_only_memory_can_be_used() -> None:
    sent = TensorMessage("x", tensors())
    header, frames = serialize(sent)
    assert_same(deserialize(header, [bytes(frame) for frame in frames]), sent)


def test_dask_knows_how_large_a_message_of_tensors_is() -> None:
    assert sizeof(TensorMessage(None, (torch.empty(1 << 20, dtype=torch.bfloat16),))) >= 2 << 20
