"""An adapter (LoRA, arXiv 2106.09685): small weights with which a request is computed, in addition to the model's.

KV of one adapter cannot be used with another: documents, cached blocks and saved files each belong to one.
"""

from __future__ import annotations

from typing import NamedTuple


class Adapter(NamedTuple):
    """An adapter as processes name it to each other.

    Parameters
    ----------
    path
        Absolute path of its folder, which the client and every worker can read.
    fingerprint
        SHA-256 of its configuration and weights: another training run at the same path is another adapter.
    """

    path: str
    fingerprint: str


def adapter_key(adapter: Adapter | None) -> str:
    """Identifies KV of this adapter; empty for the model without one."""
    return "" if adapter is None else adapter.fingerprint
