"""Configuration: Dask's, checked against a schema and read once into a frozen value.

The defaults are in ``distkv.yaml`` and are registered with :mod:`dask.config` on import. ``dask.config`` (files and
:func:`dask.config.set`), environment variables (``DASK_DISTKV__WINDOW__STEPS=8``) and the arguments of
:meth:`Config.load` override them in that order. Only ``distkv-schema.yaml`` says which keys exist and which values they
may have.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from numbers import Integral, Real
from typing import Any

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta
from jsonschema import Draft202012Validator

from distkv_dask.errors import ConfigError

ROOT = "distkv"
"""The section of Dask's configuration that has all keys."""

Schema = Mapping[str, Any]


def _read(name: str) -> Any:
    return yaml.safe_load(files("distkv_dask").joinpath(name).read_text(encoding="utf-8"))


def _leaves(section: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    for name, schema in section["properties"].items():
        key = f"{path}.{name}"
        if "properties" in schema:
            yield from _leaves(schema, key)
        else:
            yield key, schema


_SCHEMA: Schema = _read("distkv-schema.yaml")["properties"][ROOT]
_KEYS: dict[str, Schema] = dict(_leaves(_SCHEMA, ROOT))

_DEFAULTS = _read("distkv.yaml")

dask.config.update_defaults(_DEFAULTS)


def _key(key: str) -> Any:
    return field(metadata={"key": f"{ROOT}.{key}"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one engine; build it with :meth:`load`.

    Parameters
    ----------
    kv_memory
        KV memory of each worker in bytes, or None for half of what the weights leave of the worker's memory limit.
    block_tokens
        Tokens in a block, a power of two.
    threads
        Compute threads of each of a worker's two lanes, or None for the worker's own number of threads.
    granularity
        How steps become Dask tasks: ``"window"``, one for each member of a gang, or ``"layer"``, one for each layer and
        worker.
    device
        What workers compute on: ``"auto"``, ``"cpu"`` or ``"cuda"``.
    cuda_graphs
        Whether decode steps on a card are captured as CUDA graphs.
    weights
        Where weights are: ``"memory"``, ``"disk"`` (layers are read while others compute), or ``"auto"`` (from disk if
        they do not fit).
    stages
        Workers among which a model's layers are divided, or ``"auto"`` (the fewest that have room for them).
    channel
        How queries and partials travel between workers: ``"auto"``, ``"tcp"``, ``"unix"`` or ``"ucx"``.
    unencrypted_channels
        Whether ``"ucx"``, which cannot be encrypted, is allowed on a cluster with certificates.
    prefix_cache
        Whether blocks of requests that ended stay, until their room is needed, for requests that begin alike.
    prefix_cache_tier
        The last tier to which their KV goes when its room is needed: ``"memory"`` (to none), ``"workers"`` (the free
        memory of others) or ``"disk"``.
    deterministic
        Whether an answer has the same bits with any number of other requests in the batch.
    adapters
        Maximum LoRA adapters that a worker keeps in memory.
    speculation
        Maximum tokens that a decode step proposes for each sequence: a number, ``"auto"`` or ``"off"``.
    policy
        Where KV goes, what moves, and which request is next: a name of :data:`distkv_dask.scheduler.policies.POLICIES`.
    performance
        Whether workers are timed when an engine opens: ``"auto"`` (once for each model and hardware), ``"measure"``
        (again) or ``"preset"`` (not at all).
    instruction_set
        Which instruction set of the C++ core computes attention on CPUs: ``"auto"`` (the fastest) or a name.
    prefill_chunk_tokens
        Tokens of a prompt computed at once.
    prefill_workers
        Maximum workers that compute one prompt at the same time, or ``"auto"``.
    window_seconds, window_stream_seconds
        Length of a decode window, and its length while an answer is streamed or a request waits for its end.
    window_scheduler_share, window_max_seconds
        Share of one core that windows may cost the scheduler, and the maximum length of windows that this may cause.
    window_steps
        A window ends after this many steps at the latest, if not None.
    window_batch
        Sequences that one home decodes together.
    trace
        File, or folder for a file, into which the engine writes what the workers' lanes spend their time on; None
        records nothing.
    lend_limit
        Largest share of a worker's KV memory, from 0 to 1, that it lends to sequences of other homes.
    host_memory
        Bytes of pinned host memory that a worker with a card fills with KV before its disk, or None for a quarter of
        the worker's memory limit.
    spill
        Maximum bytes of its own disk that a worker fills with KV: of idle documents, preempted requests, and requests
        that ended.
    move_tokens_per_step
        Tokens of live sequences' KV that a worker sends or receives while a decode step runs.
    timeout_open, timeout_start, timeout_receive, timeout_drain, timeout_close, timeout_files
        Time limits in seconds: opening an engine, starting a gang, silence of a peer, moving everything away from a
        worker that is retired, closing an engine, lack of progress of a folder with saved documents.
    """

    kv_memory: int | None = _key("kv-memory")
    block_tokens: int = _key("block-tokens")
    threads: int | None = _key("threads")
    granularity: str = _key("granularity")
    device: str = _key("device")
    cuda_graphs: bool = _key("cuda-graphs")
    weights: str = _key("weights")
    stages: str | int = _key("stages")
    channel: str = _key("channel")
    unencrypted_channels: bool = _key("unencrypted-channels")
    prefix_cache: bool = _key("prefix-cache")
    prefix_cache_tier: str = _key("prefix-cache-tier")
    deterministic: bool = _key("deterministic")
    speculation: str | int = _key("speculation")
    adapters: int = _key("adapters")
    policy: str = _key("policy")
    performance: str = _key("performance")
    instruction_set: str = _key("instruction-set")
    prefill_chunk_tokens: int = _key("prefill.chunk-tokens")
    prefill_workers: str | int = _key("prefill.workers")
    window_seconds: float = _key("window.seconds")
    window_stream_seconds: float = _key("window.stream-seconds")
    window_scheduler_share: float = _key("window.scheduler-share")
    window_max_seconds: float = _key("window.max-seconds")
    window_steps: int | None = _key("window.steps")
    window_batch: int = _key("window.batch")
    trace: str | None = _key("trace")
    lend_limit: float = _key("lend-limit")
    host_memory: int | None = _key("host-memory")
    spill: int = _key("spill")
    move_tokens_per_step: int = _key("move.tokens-per-step")
    timeout_open: float = _key("timeouts.open")
    timeout_start: float = _key("timeouts.start")
    timeout_receive: float = _key("timeouts.receive")
    timeout_drain: float = _key("timeouts.drain")
    timeout_close: float = _key("timeouts.close")
    timeout_files: float = _key("timeouts.files")

    @property
    def stage_count(self) -> int:
        """Number of stages; 1 before it is chosen, which it is when an engine opens."""
        return self.stages if isinstance(self.stages, int) else 1

    @classmethod
    def load(cls, **overrides: Any) -> Config:
        """Read Dask's configuration as it is now, replace what ``overrides`` give, and check everything.

        Parameters
        ----------
        **overrides
            Values by field name (``window_steps=8``), as in the YAML file: numbers, words, or text with a unit. None
            leaves the configured value.

        Raises
        ------
        ConfigError
            On an unknown key or argument, or a value that is not allowed.
        """
        names = {f.name: f.metadata["key"] for f in fields(cls)}
        given = _flatten(_DEFAULTS[ROOT], ROOT, _SCHEMA) | _flatten(dask.config.get(ROOT, {}), ROOT, _SCHEMA)
        values = {name: _checked(key, given[key], key) for name, key in names.items() if overrides.get(name) is None}
        for name, value in overrides.items():
            if name not in names:
                raise ConfigError(f"{name} is not a setting.{_nearest(name, names)}")
            if value is not None:
                values[name] = _checked(names[name], value, f"{names[name]} (argument {name})")
        return cls(**values)


def _flatten(given: Any, path: str, section: Schema) -> dict[str, Any]:
    """Full key -> raw value of one section; a key may be spelled with ``_`` for ``-``, as everywhere in Dask."""
    properties = section["properties"]
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path} is {given!r}, but must be a section with the keys {', '.join(properties)}.")
    flat: dict[str, Any] = {}
    for name, value in given.items():
        name = str(name).replace("_", "-")
        key = f"{path}.{name}"
        if name not in properties:
            raise ConfigError(f"{key} is not a setting.{_nearest(key, _KEYS)}")
        flat |= _flatten(value, key, properties[name]) if "properties" in properties[name] else {key: value}
    return flat


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else f" Settings are: {', '.join(known)}."


def _checked(key: str, given: Any, label: str) -> Any:
    """``given`` as the number, word or None that it stands for; ConfigError if the schema does not allow it."""
    schema = _KEYS[key]
    value = _number(given, schema.get("unit"))
    if value is False and "off" in schema.get("enum", ()):
        value = "off"  # which YAML reads as false
    finite = not isinstance(value, float) or math.isfinite(value)
    unread = isinstance(value, str) and "unit" in schema
    if unread or not finite or not Draft202012Validator(schema).is_valid(value):
        raise ConfigError(f"{label} is {given!r}, but must be {_allowed(schema)}.")
    if value is None or isinstance(value, str | bool):
        return value
    return float(value) if "number" in schema["type"] else int(value)


def _number(given: Any, unit: str | None) -> Any:
    """Text with a unit as a number, numbers of other libraries as Python's; anything else unchanged."""
    if isinstance(given, bool):
        return given
    if isinstance(given, Integral):
        return int(given)
    if isinstance(given, Real):
        return float(given)
    if isinstance(given, str) and unit and any(character.isdigit() for character in given):
        try:
            return parse_bytes(given) if unit == "bytes" else float(parse_timedelta(given))
        except (ValueError, KeyError, OverflowError):
            return given
    return given


def _allowed(schema: Schema) -> str:
    """What ``schema`` allows, in words."""
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if "boolean" in kinds:
        text = "true or false"
    elif "enum" in schema:
        text = f"one of {', '.join(map(str, schema['enum']))}"
    elif "unit" not in schema and "string" in kinds:
        text = "a path"
    else:
        text = "a whole number" if "integer" in kinds else "a number"
        if "unit" in schema:
            example = {"bytes": "64 MiB", "seconds": "2 minutes"}[schema["unit"]]
            text += f' of {schema["unit"]} or text such as "{example}",'
        if "maximum" in schema:
            text += f" from {schema['minimum']} to {schema['maximum']}"
        else:
            text += (
                f" of at least {schema['minimum']}" if "minimum" in schema else f" above {schema['exclusiveMinimum']}"
            )
    return f"{text}, or null" if "null" in kinds else text
