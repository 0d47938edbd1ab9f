"""Chooses a worker's attention kernels: measured once per machine, kept with the worker's other measurements."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from filelock import FileLock, Timeout

from distkv_dask.config import Config
from distkv_dask.errors import ConfigError
from distkv_dask.kernels import Choice, choose, native_kernel
from distkv_dask.kernels.instruction_sets import SetTimes, time_sets
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.timing.measurement_cache import cache_file, hardware, keep, read_kept

FORM = 1
"""Version of the measurement."""
KEPT_SECONDS = 30 * 24 * 3600
"""After this time, a machine is measured again: earlier disturbances have ended."""
LOCK_SECONDS = 10

_times: dict[torch.dtype, SetTimes] = {}
_lock = Lock()


def choose_kernels(pool: Pool, config: Config) -> Choice:
    """Choose the kernels for a pool; returns their names and the reason.

    Instruction sets of the C++ core are chosen for all engines of the process with KV of this dtype. Measurements are
    kept until the process ends, so that an open engine's answers do not change their bits.

    Raises
    ------
    ConfigError
        The processor does not have the instruction set that ``distkv.instruction-set`` names.
    """
    served = choose(pool.device.torch.type, pool.dtype, pool.head_dim, pool.block_tokens)
    if served.name != "native":
        return served
    few, many, reason = _sets(pool.dtype, config)
    try:
        native_kernel.serve_with(pool.dtype, few=few, many=many)
    except ValueError as error:
        raise ConfigError(f"distkv.instruction-set: {error}. Set it to auto, or leave this machine out") from error
    few, many = native_kernel.serving(pool.dtype)  # a set may leave some of the work to another
    return Choice(f"native, decode {few}, prefill {many}", reason)


def _sets(dtype: torch.dtype, config: Config) -> tuple[str, str, str]:
    """Instruction sets for few and for many queries, and why."""
    sets = native_kernel.instruction_sets()
    if config.instruction_set != "auto":
        return config.instruction_set, config.instruction_set, "distkv.instruction-set names it"
    if config.performance == "preset":
        return sets[0], sets[0], f"the first of {', '.join(sets)}; not measured, as distkv.performance is preset"
    with _lock:
        if dtype not in _times:
            _times[dtype] = _measured(dtype, config.performance)
        times = _times[dtype]
    return *times.fastest(), str(times)


def _measured(dtype: torch.dtype, setting: str) -> SetTimes:
    """Kept times of this machine, or new ones; disturbed ones are replaced at the next opportunity."""
    key = {"form": FORM, "kernels": native_kernel.fingerprint(), "dtype": str(dtype), **hardware("cpu")}
    file = cache_file(key)
    with _alone(file):  # other workers wait while the first one of a host measures, and read its result
        known = read_kept(file, _times_of) if setting == "auto" and _is_young(file) else None
        if known is not None and known.settled:
            return known
        fresh = time_sets(dtype, known)
        keep(file, key, {"few": fresh.few, "many": fresh.many, "work": [fresh.few_bytes, fresh.many_flop]})
        return fresh


def _times_of(kept: Any) -> SetTimes:
    few, many = (
        {str(name): (float(best), float(second)) for name, (best, second) in kept[work].items()}
        for work in ("few", "many")
    )
    if not few or not many or not {*few, *many} <= set(native_kernel.instruction_sets()):
        raise ValueError(f"instruction sets {list(few)} and {list(many)}")
    few_bytes, many_flop = kept["work"]
    return SetTimes(few, many, int(few_bytes), int(many_flop))


def _is_young(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - file.stat().st_mtime < KEPT_SECONDS
    return False


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold a lock of the host; continues without one if the folder has no locks or the lock is stuck."""
    lock = FileLock(file.with_suffix(".lock"), timeout=LOCK_SECONDS)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, Timeout):
            file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock)
        yield
