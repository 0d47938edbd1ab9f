"""An adapter (LoRA, arXiv 2106.09685): small weights beside the model's, with which a request is computed.

KV of one adapter is of no use with another one: documents, cached blocks and saved files all belong to theirs.
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
    """What tells KV of adapters apart; empty for the model without one."""
    return "" if adapter is None else adapter.fingerprint
