"""Parameters with which a batch was started: all that its answers depend on, kept in the manifest and in each file.

The manifest also has the record of the batch's runs (:mod:`distkv_dask.client.batch.record`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distkv_dask.client.batch.digest import new_digest
from distkv_dask.client.batch.parts import BEGUN, DIGESTS, LOCK, README, UNFINISHED, Parts
from distkv_dask.errors import OutputError
from distkv_dask.local_folder import sync

MANIFEST = "_distkv.json"

VERSION = 2
"""Names of files in an output's folder."""


def begun_with(schema: pa.Schema, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All that the rows of an output depend on: its columns, and the batch's parameters."""
    return {**parameters, "columns": {field.name: str(field.type) for field in schema}}


def begin_or_check(path: Path, begun: Mapping[str, Any]) -> None:
    """Begin an output in an empty folder, or check that the existing one has the same parameters.

    A damaged manifest is written again.

    Raises
    ------
    OutputError
        The folder has other files, or an output with other parameters.
    OSError
        The manifest cannot be read or written.
    """
    check_begun(path, begun)
    if _read(path / MANIFEST) is None:
        _replace(path / MANIFEST, manifest(begun))
        sync(path.absolute().parent)


def recorded(path: Path) -> dict[str, Any]:
    """The record in the manifest of an output; empty if it is missing or damaged."""
    body = _body((path / MANIFEST).read_bytes(), path) if (path / MANIFEST).exists() else None
    return {} if body is None else body.get("record", {})


def keep_record(path: Path, begun: Mapping[str, Any], record: Mapping[str, Any], readme: str) -> None:
    """Write the record of an output that was begun with these parameters; raises :class:`OSError` if it cannot."""
    _replace(path / MANIFEST, manifest(begun, record))
    _replace(path / README, readme.encode("utf-8", "backslashreplace"))


def _replace(path: Path, data: bytes) -> None:
    unfinished = path.with_name(UNFINISHED + path.name)
    unfinished.write_bytes(data)
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def check_begun(path: Path, begun: Mapping[str, Any] | None) -> None:
    """Make the checks of :func:`begin_or_check` without writing; None means parameters that are not known yet."""
    found = _read(path / MANIFEST) or _restored(path)
    if found is None:
        ours = (LOCK, UNFINISHED, MANIFEST, DIGESTS, README)
        if others := sorted(one.name for one in path.iterdir() if not one.name.startswith(ours)):
            raise OutputError(
                f"{path} is not an output of distkv (it contains {others[0]}), or one whose {MANIFEST} and all Parquet "
                f"files are damaged: choose another one"
            )
    elif begun is not None and (changed := _differences(found, json.loads(json.dumps(begun)))):
        raise OutputError(
            f"{path} was started with other parameters ({'; '.join(changed)}). To continue, repeat the command as it "
            f"was, or choose another output."
        )


def manifest(begun: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> bytes:
    """The parameters as they are kept, and the record if there is one."""
    body = {"distkv": VERSION, "parameters": begun, **({} if record is None else {"record": record})}
    return json.dumps({"digest": _digest(body), **body}, indent=1).encode()


def _read(path: Path) -> Mapping[str, Any] | None:
    """The manifest's parameters; None if it is missing or damaged."""
    return _parameters(path.read_bytes(), path) if path.exists() else None


def _restored(path: Path) -> Mapping[str, Any] | None:
    """The parameters in the first intact Parquet file; None if there is none."""
    parts = Parts(path)
    for part in parts:
        with contextlib.suppress(pa.ArrowException, OSError, ValueError):
            said = (pq.read_schema(part).metadata or {}).get(BEGUN)
            if said is not None and parts.is_whole(part) and (found := _parameters(said, part)) is not None:
                return found
    return None


def _parameters(said: bytes, where: Path) -> Mapping[str, Any] | None:
    return None if (body := _body(said, where)) is None else body["parameters"]


def _body(said: bytes, where: Path) -> dict[str, Any] | None:
    """What a manifest holds; None if it is damaged."""
    try:
        body: dict[str, Any] = json.loads(said)
        if body.pop("digest") != _digest(body):
            return None
        version, _ = body["distkv"], body["parameters"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if version != VERSION:
        raise OutputError(f"{where} was written by another version of distkv ({version}): choose another output")
    return body


def _digest(body: Mapping[str, Any]) -> str:
    return new_digest(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> list[str]:
    changed = []
    for name in {**found, **wanted}:
        then, now = found.get(name), wanted.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            changed += _differences(then, now, f"{path}{name}.")
        elif then != now:
            changed.append(f"{path}{name} was {then!r:.100}, is {now!r:.100}")
    return changed
