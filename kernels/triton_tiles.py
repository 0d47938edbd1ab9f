"""The tuning table of the Triton kernels: tiles, warps and pipeline stages by family of GPU, head dim and dtype.

tests/kernels/test_triton_compile.py checks registers, spills, shared memory, buffers and load widths of its entries.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import torch

Family = Literal["ampere", "hopper", "rocm"]
"""CUDA before 9.0, CUDA from there on, and AMD's cards."""


class Tiles(NamedTuple):
    """Launch parameters: query rows and tokens of a tile, warps, pipeline stages."""

    rows: int
    tokens: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Options for the compiler; fused multiply-add only makes scores more exact."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# By padded head dim. Few rows (decode) are limited by memory: two or three buffers of keys and values, and room for
# three programs on a processor. AMD's compiler also keeps the next tile in registers: two stages overlap there.
_FEW: dict[Family, dict[int, Tiles]] = {
    "ampere": {64: Tiles(16, 64, 4, 4), 128: Tiles(16, 64, 4, 3), 256: Tiles(16, 32, 4, 3)},
    "hopper": {64: Tiles(16, 64, 4, 4), 128: Tiles(16, 64, 4, 3), 256: Tiles(16, 32, 4, 3)},
    "rocm": {64: Tiles(16, 64, 4, 3), 128: Tiles(16, 32, 4, 3), 256: Tiles(16, 32, 4, 2)},
}
_MANY: dict[Family, dict[int, Tiles]] = {
    "ampere": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 3), 256: Tiles(64, 32, 8, 2)},
    "hopper": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 3)},
    "rocm": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(128, 32, 8, 2)},
}
# float32 products do not run on tensor cores and need many registers
_FLOAT32 = {64: Tiles(16, 32, 8, 2), 128: Tiles(16, 32, 8, 2), 256: Tiles(16, 32, 8, 1)}
_SMALLEST = 32  # tokens; smaller tiles are not worth a tensor core


def padded(head_dim: int) -> int:
    """Head dim as Triton's tiles need it: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(
    family: Family, head_dim: int, block_tokens: int, dtype: torch.dtype, int8: bool = False, capped: bool = False
) -> tuple[Tiles, Tiles]:
    """Entries of the tuning table for rows of few queries (at most 16 with the heads of a group) and of many.

    Parameters
    ----------
    family
        Of the card.
    head_dim, block_tokens
        Of the pool.
    dtype, int8, capped
        Of the queries, whether the pool is of int8, and whether scores have a soft cap.
    """
    width = max(64, padded(head_dim))
    if dtype == torch.float32:
        return _FLOAT32[width], _FLOAT32[width]
    few, many = _FEW[family][width], _MANY[family][width]
    if width == 256 and int8:  # conversions take registers, and none are free
        few = few._replace(stages=2)
    if width == 256 and (int8 or capped) and family == "rocm":
        many = many._replace(tokens=16)
    return _in_a_block(few, block_tokens), _in_a_block(many, block_tokens)


def _in_a_block(tiles: Tiles, block_tokens: int) -> Tiles:
    """Tiles that lie in one block, whose id is then looked up once, unless blocks are too small for that."""
    return tiles._replace(tokens=block_tokens) if _SMALLEST <= block_tokens < tiles.tokens else tiles


class Card(NamedTuple):
    """Properties of a GPU that launches depend on."""

    family: Family
    processors: int


@cache
def card_of(device: torch.device) -> Card:
    """Properties of a device; Triton's interpreter, on the host, acts as a small one."""
    if device.type == "cpu":
        return Card("hopper", 4)
    properties = torch.cuda.get_device_properties(device)
    family: Family = "ampere" if properties.major < 9 else "hopper"
    if torch.version.hip is not None:
        family = "rocm"
    return Card(family, properties.multi_processor_count)
