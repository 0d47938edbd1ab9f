"""Where the answers of a batch go: a folder on this machine, checked before anything is started for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from distkv_dask.client.batch.manifest import MANIFEST, check_begun
from distkv_dask.client.batch.output import locked
from distkv_dask.client.batch.parts import LOCK
from distkv_dask.errors import OutputError
from distkv_dask.filesystems import local_path


class Target(NamedTuple):
    """The folder of Parquet files, the JSONL file that is written from it in the end, if one is wanted, and the source.

    The source is as people call it: a path, or what kind of thing it is.
    """

    folder: Path
    lines: Path | None = None
    source: str = ""

    @property
    def path(self) -> Path:
        """What the user named."""
        return self.lines or self.folder


def target_of(out: str | PathLike[str], source: Any, requests: bool) -> Target:
    """Interpret the user's ``out``.

    Parameters
    ----------
    out
        A path on this machine; also as ``file:///...``.
    source
        The batch's source: a path, or anything else.
    requests
        Whether the source is an OpenAI batch file; its answers may be written as JSONL.

    Raises
    ------
    OutputError
        When it is a place of another kind, the source itself, or within the source's folder.
    """
    path = _local(os.fspath(out))
    lines = path if path.suffix == ".jsonl" else None
    if lines is not None and not requests:
        raise OutputError(f"{path}: only answers to an OpenAI batch file are written as JSONL; name a folder")
    named = os.fspath(source) if isinstance(source, str | PathLike) else f"a {type(source).__name__}"
    target = Target(path if lines is None else path.with_name(path.name + ".parquet"), lines, named)
    if isinstance(source, str | PathLike):
        read = Path(source).resolve()
        for one in (target.path, target.folder):
            if read == one.resolve() or (read.is_dir() and read in one.resolve().parents):
                raise OutputError(f"{one} is the source {source} or inside it: choose an output outside the source")
    if lines is not None and lines.exists() and not (target.folder / MANIFEST).exists():
        raise OutputError(f"{lines} already exists, and was not written by a known batch: choose another output")
    return target


def check_target(target: Target, begun: Mapping[str, Any] | None) -> None:
    """Raise :class:`OutputError` if an output cannot be started or continued; leaves no files behind.

    Parameters
    ----------
    target
        Where the output will be.
    begun
        Its parameters; None if they are not known yet.
    """
    folder = target.folder
    try:
        with _made(folder):
            fresh = not (folder / LOCK).exists()
            lock = locked(folder)
            try:
                check_begun(folder, begun)
            finally:
                if fresh:
                    (folder / LOCK).unlink()
                lock.release()
    except OSError as error:
        raise OutputError(
            f"{target.path} cannot be written: {error}. Choose an output that you may write, on a disk with room."
        ) from error


def _local(out: str) -> Path:
    if not out or "\0" in out:
        raise OutputError(f"the output is {out!r:.100}: name a folder")
    path = local_path(out)
    if path is None:
        raise OutputError(
            f"{out} is not a folder on this machine: an output grows row by row, and is locked, renamed and synced to "
            f"disk, which only local file systems do. Choose a local folder, and copy it when the batch is done."
        )
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise OutputError(f"{out} names no folder: {error}") from error


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents temporarily."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    finally:
        for one in missing:
            with contextlib.suppress(OSError):
                one.rmdir()
