"""Rows that do not depend on how many others are computed with them (``distkv.deterministic``).

A matrix product adds in a different order for 3 rows than for 64, and a vectorized activation treats the last elements
of a tensor differently. Which numbers of rows give the same bits depends on the processor, the library and the number
of threads. So they are found by trial, and everything is computed in these numbers of rows, padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distkv_dask.errors import UnsupportedModelError
from distkv_dask.geometry import Geometry
from distkv_dask.worker.model.hook import AttentionStep

SIZES = tuple(1 << power for power in range(10))
"""Numbers of rows that are tried."""

BASE = 64
"""Every batch should give the bits of this number of rows, which is cheap for large batches; a smaller number is used
if the bits of a row depend on its place among this many."""

_ELEMENTS = 1 << 22
"""Maximum elements of a result in a trial."""

_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")

_ADVICE = "set distkv.deterministic to false, or choose a model without experts, such as Llama or Qwen3"

Rows = Callable[[Tensor], Tensor]
"""A function from [rows, in] to [rows, out], row by row."""

Forward = Callable[[Tensor, Tensor, AttentionStep], Tensor]
"""A model's forward: token ids, positions and attention to logits."""


def compute_rows_alike(model: torch.nn.Module) -> None:
    """Make a model's linears and activations give every row the same bits with any other rows.

    Raises
    ------
    UnsupportedModelError
        When it has matrices outside of linears, such as experts.
    """
    linears: dict[tuple[object, ...], tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            key = module.in_features, module.out_features, module.bias is None
            if key not in linears:
                linears[key] = linear_sizes(module)
            plain = partial(functional.linear, weight=module.weight, bias=module.bias)  # without a cycle to the module
            module.forward = TiledLinear(plain, linears[key])  # type: ignore[assignment]
        elif type(module).__module__ in _ACTIVATIONS:
            module.forward = TiledActivation(module.forward)
        elif not isinstance(module, torch.nn.Embedding):
            for name, weights in module.named_parameters(recurse=False):
                if weights.dim() > 1:
                    raise UnsupportedModelError(
                        f"distkv.deterministic: the model's {path}.{name} is a matrix outside of linears: {_ADVICE}"
                    )


def check_rows_alike(forward: Forward, geometry: Geometry, device: torch.device) -> None:
    """Run a model with many rows, and again with few of them.

    Raises
    ------
    UnsupportedModelError
        When the logits differ: other parts than linears and activations depend on the number of rows.
    """
    count = 2 * BASE + 3
    ids = torch.linspace(0, geometry.vocab_size - 1, count, device=device).long()
    positions = torch.arange(count, device=device)
    together = forward(ids, positions, _EachItself())
    for start, size in (
        (0, 1),
        (1, 2),
        (3, 3),
        (6, 5),
        (11, 9),
        (20, BASE - 1),
        (7, BASE),
        (1, BASE + 1),
        (0, count - 1),
    ):
        some = slice(start, start + size)
        if not torch.equal(together[some], forward(ids[some], positions[some], _EachItself())):
            raise UnsupportedModelError(
                f"distkv.deterministic: the model rounds differently with {size} tokens in a step than with "
                f"{count}, in addition to its linears: {_ADVICE}"
            )


class _EachItself:
    """Replaces attention: a function of each token's own query, key and value."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        mixed: Tensor = q * scale + k.repeat_interleave(groups, 1)
        return mixed[..., : v.shape[-1]] + v.repeat_interleave(groups, 1)


class TiledLinear:
    """A linear, computed in certain numbers of rows."""

    def __init__(self, function: Rows, sizes: Sequence[int]) -> None:
        self._function = function
        self._sizes = sizes

    def __call__(self, rows: Tensor) -> Tensor:
        """From [..., in] to [..., out]."""
        done = in_tiles(self._function, rows.flatten(0, -2), self._sizes)
        return done.view(*rows.shape[:-1], done.shape[1])


class TiledActivation:
    """An activation, computed in certain numbers of rows.

    It is computed in float32: in 16 bits differences exist, but are too rare to be found by trial.
    """

    def __init__(self, function: Rows) -> None:
        self._function = function
        self._sizes: dict[int, tuple[int, ...]] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """Elements of [..., width]."""
        flat = rows.flatten(0, -2).float()
        width = flat.shape[1]
        if width not in self._sizes:
            self._sizes[width] = activation_sizes(self._function, width, flat.device)
        return in_tiles(self._function, flat, self._sizes[width]).to(rows.dtype).view(rows.shape)


def linear_sizes(linear: torch.nn.Linear) -> tuple[int, ...]:
    """Find the numbers of rows with which linears of this shape give the same bits.

    All sums in the trial are 0 except for rounding, so that no dtype hides it.
    """
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = linear.in_features, linear.out_features
    to: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}

    def opposite(count: int, sign: int) -> Tensor:
        half = torch.randn(count, inputs // 2, generator=generator).to(**to)
        return torch.cat((half, sign * half, torch.zeros(count, inputs % 2, **to)), 1)

    weight, rows = opposite(outputs, 1), opposite(_trial_rows(max(inputs, outputs)), -1)
    bias = None if linear.bias is None else torch.zeros(outputs, **to)
    return row_sizes(lambda some: functional.linear(some, weight, bias), rows, 2)


def activation_sizes(function: Rows, width: int, device: torch.device) -> tuple[int, ...]:
    """Find the numbers of rows with which an activation gives the same bits in float32."""
    rows = 3 * torch.randn(_trial_rows(width), width, generator=torch.Generator().manual_seed(0))
    return row_sizes(function, rows.to(device), 24)


def row_sizes(function: Rows, rows: Tensor, shifts: int) -> tuple[int, ...]:
    """Find the numbers of rows with which a function gives the same bits, at any position of a row among them.

    Parameters
    ----------
    function
        The function to try.
    rows
        [n, in], its input in the trial; n is a multiple of :data:`BASE`.
    shifts
        Maximum shift of the rows: larger ones find rarer differences.
    """

    def alike(size: int, right: Tensor) -> bool:
        shifted = (in_tiles(function, rows.roll(shift, 0), [size]) for shift in range(shifts))
        return all(torch.equal(found, right.roll(shift, 0)) for shift, found in enumerate(shifted))

    bases = (size for size in reversed(SIZES) if size <= BASE)
    base, right = next((size, right) for size in bases if alike(size, right := in_tiles(function, rows, [size])))
    return tuple(size for size in SIZES if size == base or (size <= len(rows) and alike(size, right)))


def in_tiles(function: Rows, rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compute rows [n, in] in tiles of certain sizes, padding the last if needed; returns [n, out]."""
    count = len(rows)
    tiles = list(_tiles(count, sizes))
    if not tiles:
        return function(rows)
    rows = functional.pad(rows, (0, 0, 0, sum(tiles) - count))
    done = [function(tile) for tile in rows.split(tiles)]
    return (done[0] if len(done) == 1 else torch.cat(done))[:count]


def _tiles(count: int, sizes: Sequence[int]) -> Iterator[int]:
    """Sizes of tiles for a number of rows: large ones while they are full, then the smallest that holds the rest."""
    while count > 0:
        holding, full = [one for one in sizes if one >= count], [one for one in sizes if one <= count]
        size = max(full) if full and (count >= BASE or not holding) else min(holding)
        yield size
        count -= size


def _trial_rows(width: int) -> int:
    return max(BASE, min(SIZES[-1], _ELEMENTS // width // BASE * BASE))
