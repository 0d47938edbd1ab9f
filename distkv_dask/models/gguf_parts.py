"""GGUF files in parts, ``…-00001-of-00003.gguf``: all of them are one model, whichever is named.

Transformers reads one file only, so parts are joined before it does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distkv_dask.errors import ModelError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_parts(file: Path) -> list[Path]:
    """All files of the model that ``file`` belongs to, in order; a file that is not a part is alone.

    Raises
    ------
    ModelError
        The message names a missing part.
    """
    if (named := _PART.fullmatch(file.name)) is None:
        return [file]
    count = int(named[3])
    parts = [file.with_name(f"{named[1]}-{at:05}-of-{count:05}.gguf") for at in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(
            f"{file.name} is one of {count} parts of a model, and {missing[0]} is missing in {str(file.parent)!r}: "
            "download all parts into one folder"
        )
    return parts


class GgufModel:
    """The contents of one model's GGUF files; their data are mapped, not read.

    Parameters
    ----------
    parts
        As :func:`gguf_parts` returns them.

    Attributes
    ----------
    architecture
        llama.cpp's name of the model's type.
    keys
        Its metadata for that architecture, without the architecture's name: ``rope.freq_base``, for example.
    fields, tensors
        Name to field of the metadata, and name to tensor, as gguf's reader has them.

    Raises
    ------
    ModelError
        When parts are missing or belong to other models, or it is not a language model.
    """

    def __init__(self, parts: Sequence[Path]) -> None:
        from gguf import GGUFReader

        self._readers = [GGUFReader(part) for part in parts]
        self.fields = self._readers[0].fields
        self.architecture = str(self._value("general.architecture"))
        if (kind := self._value("general.type", "model")) != "model" or self.architecture == "clip":
            raise ModelError(
                f"{parts[0].name} holds no language model (general.type {kind!r}): give the model's own file"
            )
        self.tensors: dict[str, Any] = {tensor.name: tensor for one in self._readers for tensor in one.tensors}
        self._check_parts(parts)
        start = f"{self.architecture}."
        self.keys = {name.removeprefix(start): self._value(name) for name in self.fields if name.startswith(start)}

    def join(self, target: Path, with_data: bool) -> None:
        """Write all parts as one file; without their data it has the same size, but takes no room on disk."""
        from gguf import GGUFValueType, GGUFWriter

        writer = GGUFWriter(target, self.architecture)
        for name, field in self.fields.items():
            if not name.startswith(("GGUF.", "split.")) and name != "general.architecture":
                inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], inner)
        for name, one in self.tensors.items():
            writer.add_tensor_info(name, one.data.shape, one.data.dtype, one.data.nbytes, one.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in self.tensors.values() if with_data else ():
            writer.write_tensor_data(one.data)
        writer.close()
        if not with_data:
            data = sum(GGUFWriter.ggml_pad(one.data.nbytes, writer.data_alignment) for one in self.tensors.values())
            os.truncate(target, target.stat().st_size + writer.data_alignment + data)

    def _value(self, name: str, otherwise: Any = None) -> Any:
        return self.fields[name].contents() if name in self.fields else otherwise

    def _check_parts(self, parts: Sequence[Path]) -> None:
        count, tensors = self._value("split.count", 0), self._value("split.tensors.count", len(self.tensors))
        if count not in (0, len(parts)):
            raise ModelError(
                f"{parts[0].name} is one of {count} parts of a model: put all of them into one folder, under names "
                f"that end in -00001-of-{count:05}.gguf and so on"
            )
        if tensors != len(self.tensors):
            raise ModelError(
                f"{parts[0].name} says that its parts hold {tensors} tensors, but they hold {len(self.tensors)}: they "
                "belong to different models, download all of them again"
            )
