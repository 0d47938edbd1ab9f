"""GGUF files, converted once to a form that transformers reads fast.

Reading a GGUF file through transformers takes 18 s of Python even for a small model (its vocabulary is parsed item by
item, several times), and each worker would pay it. So configuration and tokenizer, and the weights in each requested
dtype, are saved in the user's cache directory, where all processes of a machine and all later runs find them: 0.4 s.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from distkv_dask.cache_folder import cache_folder
from distkv_dask.errors import ModelError, in_words
from distkv_dask.models.complete import check_complete
from distkv_dask.models.files import refuse_pointer
from distkv_dask.models.gguf_keys import check_tensors, complete_config
from distkv_dask.models.gguf_parts import GgufModel, gguf_parts
from distkv_dask.models.weight_sizes import COUNTED

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16
_FORM = 3
"""Incremented when the same file would be converted to a different result."""


def converted_text(file: Path) -> Path:
    """Return a directory with the configuration and tokenizer of a GGUF file, or of one in parts.

    Raises
    ------
    ModelError
        When the file cannot be read or the cache directory cannot be written, or transformers' model would not compute
        as the file says.
    """
    return _converted(file, "text", _save_text)


def converted_weights(file: Path, dtype: str) -> Path:
    """Return a directory with the dequantised weights of a GGUF file in ``dtype`` (torch's name of it), as safetensors.

    Raises
    ------
    ModelError
        As :func:`converted_text`.
    """
    text = converted_text(file)
    return _converted(file, dtype, lambda parts, alone, target: _save_weights(parts, alone, target, text, dtype))


def _converted(file: Path, part: str, save: Callable[[Sequence[Path], Path, Path], None]) -> Path:
    """Return the converted ``part`` of ``file``; the first process converts it while the others wait."""
    parts = gguf_parts(file)
    try:
        home = cache_folder("gguf") / _identity(parts)
        done = home / part
        if done.is_dir():
            return done
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{part}.lock"):
            if not done.is_dir():
                scratch = Path(tempfile.mkdtemp(prefix=f"{part}.", dir=home))
                alone = Path(tempfile.mkdtemp(prefix=f"{part}.", dir=home))  # transformers reads its neighbours, too
                try:
                    save(parts, alone / parts[0].name, scratch)
                    os.replace(scratch, done)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                    shutil.rmtree(alone)
        return done
    except OSError as error:
        raise ModelError(
            f"GGUF file {str(file)!r} cannot be converted below {cache_folder('gguf')} (set XDG_CACHE_HOME for another "
            f"place): {in_words(error)}"
        ) from error
    except Exception as error:  # a damaged file: the reader may raise any error
        raise ModelError(f"GGUF file {str(file)!r} cannot be converted: {in_words(error)}") from error


def _identity(parts: Sequence[Path]) -> str:
    """A hash of files (of their sizes, and of samples spread over them) and of the versions that read them."""
    from transformers import __version__

    digest = hashlib.sha256(f"{_FORM} {__version__}".encode())
    for file in parts:
        refuse_pointer(file)
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return f"{parts[0].stem}-{digest.hexdigest()[:16]}"


def _save_text(parts: Sequence[Path], alone: Path, target: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    model = GgufModel(parts)
    _place(model, parts, alone, with_data=False)
    config = AutoConfig.from_pretrained(alone.parent, gguf_file=alone.name)
    complete_config(config.get_text_config(), model)
    check_tensors(config, model)
    config.save_pretrained(target)
    numbers = sum(int(tensor.n_elements) for tensor in model.tensors.values())
    (target / COUNTED).write_text(json.dumps({"F32": numbers}))
    if "tokenizer.ggml.tokens" in model.fields:
        AutoTokenizer.from_pretrained(alone.parent, gguf_file=alone.name).save_pretrained(target)


def _save_weights(parts: Sequence[Path], alone: Path, target: Path, text: Path, dtype: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    _place(GgufModel(parts), parts, alone, with_data=True)
    load: Any = AutoModelForCausalLM.from_pretrained
    model, found = load(
        alone.parent,
        gguf_file=alone.name,
        config=AutoConfig.from_pretrained(text),
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_complete(found, model.config.get_text_config(), parts[0].name)
    model.hf_quantizer = None  # the weights are plain tensors now, but save_pretrained would take them for packed ones
    model.save_pretrained(target)


def _place(model: GgufModel, parts: Sequence[Path], alone: Path, with_data: bool) -> None:
    """Provide one file where transformers reads it."""
    if len(parts) == 1:
        alone.symlink_to(parts[0].absolute())
    else:
        model.join(alone, with_data)
