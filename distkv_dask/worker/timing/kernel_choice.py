"""Chooses a worker's attention kernels: measured once per machine, kept with the worker's other measurements."""

from __future__ import annotations

from functools import partial
from threading import Lock
from typing import Any

import torch

from distkv_dask.config import Config
from distkv_dask.errors import ConfigError
from distkv_dask.kernels import Choice, choose, native_kernel
from distkv_dask.kernels.instruction_sets import SetTimes, time_sets
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.timing.machine_times import machine_times
from distkv_dask.worker.timing.measurement_cache import hardware

FORM = 1
"""Version of the measurement."""

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
    """Kept times of this machine, or new ones."""
    key = {"form": FORM, "kernels": native_kernel.fingerprint(), "dtype": str(dtype), **hardware("cpu")}
    return machine_times(key, partial(time_sets, dtype), (_times_of, _as_json), again=setting != "auto")


def _as_json(times: SetTimes) -> dict[str, Any]:
    return {"few": times.few, "many": times.many, "work": [times.few_bytes, times.many_flop]}


def _times_of(kept: Any) -> SetTimes:
    few, many = (
        {str(name): (float(best), float(second)) for name, (best, second) in kept[work].items()}
        for work in ("few", "many")
    )
    if not few or not many or not {*few, *many} <= set(native_kernel.instruction_sets()):
        raise ValueError(f"instruction sets {list(few)} and {list(many)}")
    few_bytes, many_flop = kept["work"]
    return SetTimes(few, many, int(few_bytes), int(many_flop))
