"""Linears with weights in the form that oneDNN computes with, so that it does not rearrange them in every call.

One row then takes half of the time, 8 rows two thirds, and hundreds of rows nearly as long; results have the same bits.
The loaded weights are kept, too: most are mapped from files, and other parts of the model use them.
"""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

PART = 1 / 16
"""Maximum part of a worker's memory for packed weights; more is better used for KV."""

REORDER, LINEAR = "_reorder_linear_weight", "_linear_pointwise"
"""Operations of torch that Inductor uses, too."""


def packing_room(limit: int | None) -> int:
    """Maximum bytes of packed weights on a worker with this memory limit (None: without one)."""
    free = psutil.virtual_memory().available
    return int(PART * (free if limit is None else min(free, limit)))


def pack_linears(model: torch.nn.Module, room: int) -> int:
    """Pack the weights of a model's linears; the modules stay the same but compute with packed weights.

    Parameters
    ----------
    model
        A model in host memory.
    room
        Bytes that all of it may take; nothing is packed if it would take more.

    Returns
    -------
    int
        Bytes that were packed: 0 where oneDNN does not serve the dtype on this processor, and in float32, where torch
        computes with another library.
    """
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear and _is_short(module.weight)]
    linears = [linear for linear in linears if "forward" not in vars(linear)]  # others skip rows, or compute them alike
    size = sum(linear.weight.nbytes for linear in linears)
    if not linears or size > room or not torch.backends.mkldnn.is_available():
        return 0
    try:
        for linear in linears:
            linear.forward = PackedLinear(linear.weight, linear.bias)  # type: ignore[assignment]
    except RuntimeError:  # float16 needs instructions that the processor does not have: it is so for the first one
        return 0
    return size


class PackedLinear:
    """The product of a linear with packed weights.

    Parameters
    ----------
    weight, bias
        [out, in] and [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        with torch.no_grad():
            self._packed = getattr(torch.ops.mkldnn, REORDER)(weight.detach())
        self._bias = bias
        self._linear = getattr(torch.ops.mkldnn, LINEAR)

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        product: Tensor = self._linear(rows, self._packed, self._bias, "none", [], "")
        return product


def _is_short(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)
