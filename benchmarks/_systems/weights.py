"""The model for all systems: a transformers folder with bfloat16 weights, and a GGUF file with the same weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import resolve_model


def model_files(folder: Path, with_gguf: bool) -> dict[str, str]:
    """Paths of SmolLM2-135M in bfloat16: for transformers and vLLM, and for llama.cpp a GGUF file in ``folder``."""
    source = Path(resolve_model("smollm2-135m").location)
    target = folder / "smollm2-135m-bf16.gguf"
    if with_gguf and not target.exists():
        scratch = target.with_suffix(f".{os.getpid()}")
        write_bf16(source, scratch)
        scratch.replace(target)
    return {"model": str(converted_weights(source, "bfloat16")), "gguf": str(target)}


def write_bf16(source: Path, target: Path) -> None:
    """Copy a GGUF file with its matrices expanded to bfloat16, as transformers does, and the rest in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            _copy(writer, name, field)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, values)
            continue
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy(writer: gguf.GGUFWriter, name: str, field: Any) -> None:
    kind = field.types[0]
    sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(name, field.contents(), kind, sub_type=sub)
