"""Columns from folder names, as Hive and Spark write them: ``year=2024/country=DE/part-0.parquet``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from distkv_dask.client.files import label_of

NULL = "__HIVE_DEFAULT_PARTITION__"


def folder_columns(root: Path, paths: list[Path]) -> list[Mapping[str, int | str | None]]:
    """Return the columns that the folders between ``root`` and each file give.

    A column has integers if all its values are written as integers; ``007`` is a text.
    """
    found = [_columns(path, root) for path in paths]
    names = {name for one in found for name in one}
    whole = {name for name in names if all(_is_int(one[name]) for one in found if name in one)}
    return [{n: int(value) if n in whole and value else value for n, value in one.items()} for one in found]


def _columns(path: Path, root: Path) -> dict[str, str | None]:
    found = {}
    for part in Path(label_of(path.relative_to(root))).parts[:-1]:
        name, is_one, value = part.partition("=")
        if is_one and name:
            found[unquote(name)] = None if value == NULL else unquote(value)
    return found


def _is_int(value: str | None) -> bool:
    return value is None or (value.removeprefix("-").isdecimal() and len(value) < 19 and str(int(value)) == value)
