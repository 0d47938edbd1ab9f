"""Folders of a table format: their files alone are not the table, so the format's own library reads them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distkv_dask.errors import MissingProgramError, SourceError, in_words

_SAVED = "dataset_info.json", "state.json"
"""The file that ``datasets.Dataset.save_to_disk`` adds to its data."""

_SPLITS = "dataset_dict.json"
"""The file that ``datasets.DatasetDict.save_to_disk`` adds to the folders of its splits."""


def table_in(folder: Path) -> Any | None:
    """Open the table in a folder with its library; None if the folder belongs to no format.

    Raises
    ------
    MissingProgramError
        When the library is not installed.
    SourceError
        When the folder is more than one table, cannot be opened, or can only be read through a catalog.
    """
    if (folder / _SPLITS).is_file():
        splits = sorted(one.name for one in folder.iterdir() if all((one / name).is_file() for name in _SAVED))
        raise SourceError(f"{folder} has the splits {', '.join(splits)}: name one, such as {folder / splits[0]}")
    if all((folder / name).is_file() for name in _SAVED):
        return _opened(folder, "a data set of Hugging Face", "datasets")
    if (folder / "_delta_log").is_dir():
        return _opened(folder, "a Delta table", "deltalake")
    if next((folder / "metadata").glob("*.metadata.json"), None) is not None:
        raise SourceError(
            f"{folder} is an Iceberg table, whose current snapshot only its catalog knows: pass what pyiceberg opens, "
            f"catalog.load_table(...)"
        )
    return None


def _opened(folder: Path, what: str, library: str) -> Any:
    if find_spec(library) is None:
        raise MissingProgramError(f"{folder} is {what}, which needs {library}: pip install 'distkv-dask[tables]'")
    try:
        if library == "datasets":
            from datasets import load_from_disk

            return load_from_disk(str(folder))
        from deltalake import DeltaTable

        return DeltaTable(str(folder))
    except Exception as error:  # of any library
        raise SourceError(f"{folder} cannot be opened as {what}: {in_words(error)}") from error
