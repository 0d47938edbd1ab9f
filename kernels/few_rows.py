"""Products of few rows with a linear's bfloat16 weights, in the C++ core (native/linear.h): weights are read once.

Libraries for matrix products are made for many rows: with one row they read weights at a fraction of the bandwidth.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import native_kernel
from .memory import advise_huge_pages
from .native_structures import PackedLinear

SETS = ("amx_bf16", "avx512_bf16", "avx512")
"""Instruction sets that have such products."""
MODEL = "amx_model"
"""Tiles in software: slow, for tests."""
OUTPUTS, INPUTS = 32, 32
"""Weights are padded to multiples of these."""


def sets() -> list[str]:
    """Those of :data:`SETS` that the core has and this processor supports; none without a core."""
    if native_kernel.missing() is not None:
        return []
    return [name for name in SETS if native_kernel.linear_kernels(name)]


def packed_shape(outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """Shape of the packed weights of a linear."""
    return -(-outputs // OUTPUTS), -(-inputs // INPUTS) * (INPUTS // 2), OUTPUTS, 2


def packed(weight: Tensor) -> Tensor:
    """Weights as the core reads them; those of some outputs are packed alike alone, if they begin at a multiple of 32.

    Parameters
    ----------
    weight
        [outputs, inputs], bfloat16.

    Returns
    -------
    Tensor
        [outputs / 32, inputs / 2, 32, 2], both padded with zeros to multiples of 32.
    """
    outputs, inputs = weight.shape
    whole = pad(weight.detach(), (0, -inputs % INPUTS, 0, -outputs % OUTPUTS))
    made = torch.empty(packed_shape(outputs, inputs), dtype=weight.dtype)
    advise_huge_pages(made)
    return made.copy_(whole.view(-1, OUTPUTS, whole.shape[1] // 2, 2).transpose(1, 2))


class FewRows:
    """The product of few rows with a linear's weights.

    Parameters
    ----------
    weights
        Result of :func:`packed`.
    shape
        Outputs and inputs, without padding.
    bias
        [outputs] or None.
    kernels
        Maximum rows and name of each instruction set of :func:`sets` to use, in ascending order of rows.

    Raises
    ------
    ValueError
        The processor or the core does not have an instruction set.
    """

    def __init__(
        self, weights: Tensor, shape: tuple[int, int], bias: Tensor | None, kernels: Sequence[tuple[int, str]]
    ) -> None:
        self.outputs, self.inputs = outputs, inputs = shape
        self._kept = weights, None if bias is None else bias.detach().float().contiguous()
        self._kernels = [(most, _kernels(name)) for most, name in kernels]
        bias_at = None if self._kept[1] is None else self._kept[1].data_ptr()
        self._linear = PackedLinear(weights.data_ptr(), bias_at, inputs, outputs, 1)
        self.address = ctypes.addressof(self._linear)
        """Address of the core's structure."""

    @property
    def most(self) -> int:
        """Maximum rows."""
        return self._kernels[-1][0]

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., inputs] bfloat16 to [..., outputs], on torch's number of threads."""
        flat = rows.reshape(-1, self.inputs)
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        out = torch.empty((*rows.shape[:-1], self.outputs), dtype=torch.bfloat16)
        self._linear.threads = torch.get_num_threads()
        native_kernel.linear(self.address, self.kernels(flat.shape[0]), flat, out)
        return out

    def kernels(self, rows: int) -> int:
        """Address of the kernels for this number of rows."""
        return next(address for most, address in self._kernels if most >= rows)


def _kernels(name: str) -> int:
    found = native_kernel.linear_kernels(name)
    if not found:
        raise ValueError(f"instruction set: expected one of {sets()}, got {name!r}")
    return found
