"""GGUF files converted once to what transformers reads fast.

Reading a GGUF file through transformers takes 18 s of Python even for a small model (its vocabulary is parsed item by
item, several times), and each worker would pay it. So configuration and tokenizer, and the weights in each dtype asked
for, are saved under the user's cache directory, where all processes of a machine and all later runs find them: 0.4 s.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from distkv_dask.errors import ModelError
from distkv_dask.models.complete import check_complete

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16


def converted_text(file: Path) -> Path:
    """Return a directory with the configuration and tokenizer of a GGUF file.

    Raises
    ------
    ModelError
        When the file cannot be read or the cache directory cannot be written.
    """
    return _converted(file, "text", _save_text)


def converted_weights(file: Path, dtype: str) -> Path:
    """Return a directory with the dequantised weights of a GGUF file in ``dtype`` (torch's name of it), as safetensors.

    Raises
    ------
    ModelError
        When the file cannot be read or the cache directory cannot be written.
    """
    return _converted(file, dtype, lambda file, target: _save_weights(file, target, dtype))


def _converted(file: Path, part: str, save: Callable[[Path, Path], None]) -> Path:
    """Return the converted ``part`` of ``file``; the first process that asks converts while the others wait."""
    try:
        home = _cache_home() / _identity(file)
        done = home / part
        if done.is_dir():
            return done
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{part}.lock"):
            if not done.is_dir():
                scratch = Path(tempfile.mkdtemp(prefix=f"{part}.", dir=home))
                alone = Path(tempfile.mkdtemp(prefix=f"{part}.", dir=home))  # transformers reads its neighbours, too
                try:
                    (alone / file.name).symlink_to(file.absolute())
                    save(alone / file.name, scratch)
                    os.replace(scratch, done)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                    shutil.rmtree(alone)
        return done
    except ModelError:
        raise
    except Exception as error:  # of a damaged file: the reader raises whatever it stumbles over
        raise ModelError(
            f"GGUF file {str(file)!r} cannot be converted below {str(_cache_home())!r} (set XDG_CACHE_HOME for another "
            f"place): {error}"
        ) from error


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distkv-dask" / "gguf"


def _identity(file: Path) -> str:
    """Name the contents of ``file`` (its size, and samples spread over it) and the library that reads it."""
    from transformers import __version__

    size = file.stat().st_size
    digest = hashlib.sha256(f"{size} {__version__}".encode())
    with file.open("rb") as stream:
        for sample in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return f"{file.stem}-{digest.hexdigest()[:16]}"


def _save_text(file: Path, target: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def _save_weights(file: Path, target: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    load: Any = AutoModelForCausalLM.from_pretrained
    model, found = load(
        file.parent,
        gguf_file=file.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    check_complete(found, model.config.get_text_config(), file.name)
    model.hf_quantizer = None  # the weights are plain tensors now, but save_pretrained would take them for packed ones
    model.save_pretrained(target)
