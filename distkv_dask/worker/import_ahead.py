"""Imports that opening an engine needs, run in the background while its client still checks the model."""

from __future__ import annotations

import threading


def import_ahead() -> None:
    """Start importing torch, transformers and the modules that open an engine; returns at once."""
    # a daemon: Python waits for threads of executors when it ends, and a nanny does not wait for Python
    threading.Thread(target=_import, name="distkv-import-ahead", daemon=True).start()


def _import() -> None:
    from distkv_dask.worker import startup  # noqa: F401
    from distkv_dask.worker.model import shared  # noqa: F401
