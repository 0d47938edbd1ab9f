"""A tensor that reports ``cuda:0``: its bytes are in a CPU tensor, which only the emulated device may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from emulated.counts import note
from emulated.memory import DeviceMemory, memory_of
from emulated.streams import Stream

_CARD = 1 << 62
"""Added to addresses, so that they are invalid in any process."""
_TO_NUMPY = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first."


class CudaTensor(Tensor):
    """A tensor on the card, whose operations run through :func:`emulated.dispatch.dispatch`.

    Attributes
    ----------
    bytes
        The CPU tensor of the same shape that holds its elements; views share storages, as on a device.
    memory
        The storage's memory on the card, which is freed with the last tensor in it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    bytes: Tensor
    memory: DeviceMemory

    @staticmethod
    def __new__(cls, held: Tensor) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="cuda:0", requires_grad=False,
        )  # fmt: skip
        made.bytes, made.memory = held, memory_of(held)
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        note("sync", "repr")
        return f"{repr(self.bytes)[:-1]}, device='cuda:0')"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from emulated.dispatch import dispatch

        return dispatch(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Parts of the wrapper; with this method, modules swap such parameters instead of writing to their ``data``."""
        return ["bytes"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> CudaTensor:
        """The tensor with these parts."""
        return CudaTensor(inner["bytes"])

    @property
    def data(self) -> Tensor:
        """The tensor without its gradient; setting it also takes over the other tensor's elements."""
        return self.detach()

    @data.setter
    def data(self, other: CudaTensor) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.bytes, self.memory = other.bytes, other.memory

    def data_ptr(self) -> int:
        """An address like a card's: different for each tensor, and not readable by the host."""
        return self.bytes.data_ptr() | _CARD

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(_TO_NUMPY)
        return self.cpu().numpy()

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(_TO_NUMPY)

    def __dlpack__(self, *_: Any, **__: Any) -> NoReturn:
        raise BufferError("the emulated device's tensors cannot be given to other libraries")

    @property
    def __cuda_array_interface__(self) -> NoReturn:
        raise AttributeError("the emulated device's tensors cannot be given to other libraries")

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage, for comparisons of whether two tensors share one."""
        return self.bytes.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def pin_memory(self, device: Any = None) -> NoReturn:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def record_stream(self, stream: Stream) -> None:
        """Keep the memory, once it is freed, until the stream has done its queued work."""
        self.memory.recorded.add(stream.number)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch.no_grad():
            copied = self.clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor]]:
        return _arrived, (self.detach().cpu(),)


def _arrived(held: Tensor) -> Tensor:
    return held.to("cuda:0")
