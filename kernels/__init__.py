"""MicroAttention: attention of some queries over one worker's KV blocks, and the exact merge of partial results.

One contract (:func:`micro_attention`, :func:`merge_into`, :func:`merge`), several implementations.

May import: nothing else of the project; torch, and numba or Triton where they are installed.
May not touch: requests, sequences, workers; a kernel knows rows, blocks and queries.
"""

from __future__ import annotations

from .dispatch import IMPLEMENTATIONS, Choice, choose, make_ready, micro_attention
from .memory import advise_huge_pages
from .merge import merge, merge_into, merge_sinks
from .prepared import PreparedAttention, PreparedMerge
from .prepared_layers import PreparedLayers
from .prepared_merges import PreparedMerges

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "PreparedAttention",
    "PreparedLayers",
    "PreparedMerge",
    "PreparedMerges",
    "advise_huge_pages",
    "choose",
    "make_ready",
    "merge",
    "merge_into",
    "merge_sinks",
    "micro_attention",
]
