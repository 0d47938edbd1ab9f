"""Linears with weights in the form that is fastest for few rows: the C++ core's, or oneDNN's.

The loaded weights are kept, too: most are mapped from files, and other parts of the model use them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from distkv_dask.kernels.few_rows import FewRows, packed

PART = 1 / 16
"""Maximum part of a worker's memory for packed weights; KV makes better use of more."""

REORDER, LINEAR = "_reorder_linear_weight", "_linear_pointwise"
"""Operations of torch that Inductor uses, too."""


TORCH, ONEDNN = "torch", "oneDNN"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which products are used, by number of rows.

    Attributes
    ----------
    few
        Maximum rows and instruction set of the core's products, in order of rows; empty if they are never the fastest.
    alone
        Maximum rows for which they are the fastest; with more, they are used in the core's layers only.
    onednn
        Whether oneDNN's packed weights serve instead of them.
    """

    few: tuple[tuple[int, str], ...] = ()
    alone: int = 0
    onednn: bool = False


def packing_room(limit: int | None) -> int:
    """Maximum bytes of packed weights on a worker with this memory limit (None: without one)."""
    free = psutil.virtual_memory().available
    return int(PART * (free if limit is None else min(free, limit)))


def linears_of(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linears of a model whose weights can be packed, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and module.weight.dtype in (torch.bfloat16, torch.float16)
        and "forward" not in vars(module)  # others skip rows, or compute them alike
    }


def packable_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights of a model's linears that :func:`pack_linears` would pack, if there is room."""
    return sum(linear.weight.nbytes for linear in linears_of(model).values())


def pack_linears(model: torch.nn.Module, room: int, choose: Callable[[], Choice]) -> int:
    """Pack the weights of a model's linears; the modules stay the same but compute with packed weights.

    Parameters
    ----------
    model
        A model in host memory.
    room
        Maximum bytes of all packed weights; nothing is packed if they would take more.
    choose
        Chooses the products of bfloat16 weights. float16 is left to oneDNN, float32 to torch's library.

    Returns
    -------
    int
        Bytes that were packed: 0 if there are no products of packed weights of this dtype on this processor.
    """
    linears, size = linears_of(model), packable_bytes(model)
    if not linears or size > room:
        return 0
    try:
        for linear in linears.values():
            if (product := _product(linear, choose)) is None:
                return 0
            linear.forward = product  # type: ignore[assignment]
    except RuntimeError:  # float16 needs instructions that the processor does not have: the first one shows it
        return 0
    return size


def packed_by(model: torch.nn.Module) -> str:
    """The products of packed weights of a model, in words; empty if nothing is packed."""
    found = (vars(module).get("forward") for module in model.modules())
    return next((one.by for one in found if isinstance(one, FewRowsLinear | PackedLinear)), "")


def _product(linear: torch.nn.Linear, choose: Callable[[], Choice]) -> Callable[[Tensor], Tensor] | None:
    weight, bias = linear.weight, linear.bias
    choice = choose() if weight.dtype == torch.bfloat16 else Choice(onednn=True)
    if choice.few:
        return FewRowsLinear(weight, bias, choice)
    return PackedLinear(weight, bias) if choice.onednn and torch.backends.mkldnn.is_available() else None


def in_words(kernels: Sequence[tuple[int, str]]) -> str:
    """Instruction sets and their maximum numbers of rows, in words.

    Examples
    --------
    >>> in_words([(4, "avx512"), (512, "amx_bf16")])
    'avx512 up to 4 rows, amx_bf16 up to 512 rows'
    """
    return ", ".join(f"{name} up to {most} rows" for most, name in kernels)


class FewRowsLinear:
    """The product of a linear with weights that the C++ core has packed for few rows; more rows are left to torch.

    Parameters
    ----------
    weight, bias
        [out, in] and [out] or None, bfloat16.
    choice
        Which products are used, by number of rows.
    instead
        The packed weights, if they are in memory in place of ``weight``: then the core computes any number of rows, as
        many at a time as it serves.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, choice: Choice, instead: Tensor | None = None) -> None:
        self.by = in_words(choice.few)
        """What computes."""
        self._weight, self._bias = weight, bias
        weights = packed(weight) if instead is None else instead
        self.few = FewRows(weights, (weight.shape[0], weight.shape[1]), bias, choice.few)
        """The core's product."""
        self._alone = choice.alone if instead is None else self.few.most
        self._in_pieces = instead is not None

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if 0 < rows.numel() <= self._alone * rows.shape[-1]:
            return self.few(rows)
        if self._in_pieces and rows.numel():
            pieces = rows.reshape(-1, rows.shape[-1]).split(self.few.most)
            return torch.cat([self.few(piece) for piece in pieces]).view(*rows.shape[:-1], -1)
        return torch.nn.functional.linear(rows, self._weight, self._bias)


class PackedLinear:
    """The product of a linear with weights packed by oneDNN, so that it does not rearrange them in every call.

    One row then takes half of the time, 8 rows two thirds, and hundreds of rows nearly as long; results have the same
    bits.

    Parameters
    ----------
    weight, bias
        [out, in] and [out] or None.
    """

    by = "packed by oneDNN"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        with torch.no_grad():
            self._packed = getattr(torch.ops.mkldnn, REORDER)(weight.detach())
        self._bias = bias
        self._linear = getattr(torch.ops.mkldnn, LINEAR)

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        product: Tensor = self._linear(rows, self._packed, self._bias, "none", [], "")
        return product
