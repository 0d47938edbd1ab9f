"""The digest by which one knows that a batch's output holds what was written."""

from __future__ import annotations

import hashlib


def new_digest(data: bytes = b"") -> hashlib.blake2b:
    """Begin a digest with some data; its ``hexdigest()`` has 32 digits."""
    return hashlib.blake2b(data, digest_size=16)
