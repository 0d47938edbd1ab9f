"""The user's cache directory, for files that later runs on a machine reuse."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(part: str) -> Path:
    """A folder below ``$XDG_CACHE_HOME/distkv-dask`` (``~/.cache/distkv-dask``), which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distkv-dask" / part
