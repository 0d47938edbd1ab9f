"""Measurements of this machine, kept in the user's cache directory by model and hardware."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from distkv_dask.cache_folder import cache_folder
from distkv_dask.geometry import Measurement
from distkv_dask.worker.timing.disturbance import MOST, disturbance, is_quiet

logger = logging.getLogger("distributed.distkv.measuring")
Kept = TypeVar("Kept")
TIMES = 3
"""Maximum number of repeated timings: if threads always wait, they will also wait while serving."""


def cached_measurement(
    key: dict[str, object], setting: str, measure: Callable[[], Measurement | None]
) -> Measurement | None:
    """The measurement named by ``key``: from the cache (``setting`` "auto"), or measured now and stored there.

    A disturbed measurement is used until the machine is quiet, and is then repeated. None with the setting "preset",
    and if nothing could be measured. A cache that cannot be read or written only costs time.
    """
    if setting == "preset":
        return None
    file = cache_file(key)
    known, waited, times = read_kept(file, _kept) or (None, 0.0, 0)
    if setting == "auto" and known is not None:
        if waited <= MOST or times >= TIMES or not is_quiet():
            return known
        logger.info("this worker is timed again: when it was, it waited for processors for %.0f %%", 100 * waited)
    with disturbance() as found:
        fresh = measure()
    if fresh is None:
        return known if setting == "auto" else None
    keep(file, key, asdict(fresh) | {"waited": found.waited, "times": times + 1 if setting == "auto" else 1})
    return fresh


def cache_file(key: dict[str, object]) -> Path:
    """The file of the measurement named by ``key``."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_home() / f"{digest}.json"


def cache_home() -> Path:
    """The folder of measurements."""
    return cache_folder("performance")


def hardware(device: str) -> dict[str, object]:
    """Properties of this machine and device that determine its speed."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line for line in lines if line.startswith("model name")), processor)
    versions = {name: version(name) for name in ("distkv-dask", "torch", "transformers")}
    return {"host": platform.node(), "processor": processor, "cores": os.cpu_count(), "device": device, **versions}


def _kept(kept: Any) -> tuple[Measurement, float, int]:
    """A measurement, the part of the time that threads waited for processors, and the number of attempts."""
    measured = Measurement(
        tuple((int(batch), int(tokens), float(seconds)) for batch, tokens, seconds in kept["decode"]),
        tuple((int(tokens), int(before), float(seconds)) for tokens, before, seconds in kept["prompt"]),
        tuple((int(tokens), float(seconds)) for tokens, seconds in kept["attention"]),
        None if kept["exchange"] is None else float(kept["exchange"]),
    )
    return measured, float(kept["waited"]), int(kept["times"])


def is_young(file: Path, seconds: float) -> bool:
    """Whether a measurement was kept at most some seconds ago."""
    with contextlib.suppress(OSError):
        return time.time() - file.stat().st_mtime < seconds
    return False


def read_kept(file: Path, parse: Callable[[Any], Kept]) -> Kept | None:
    """The measurement stored by :func:`keep`; None if there is none or if it cannot be read (which is logged).

    ``parse`` converts the measurement from JSON.
    """
    try:
        return parse(json.loads(file.read_text(encoding="utf-8"))["measured"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("measurements in %s cannot be read and are taken again: %r", file, error)
        return None


def keep(file: Path, key: dict[str, object], measured: dict[str, Any]) -> None:
    """Store a measurement atomically: other workers of the machine read and write it, too."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump({"key": key, "measured": measured}, out, indent=1)
            os.replace(scratch, file)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as error:
        logger.warning("measurements cannot be kept in %s: %s", file, error)
