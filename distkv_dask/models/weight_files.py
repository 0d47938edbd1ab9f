"""The files of a model's weights: complete safetensors files in the model's own folder.

Pickled weights are refused, since reading a pickle can run code, and so are files elsewhere. Damage is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distkv_dask.errors import ModelError
from distkv_dask.models.files import read_json, refuse_pointer
from distkv_dask.models.layer_values import layer_values

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "*.bin", "*.pt", "*.pth", "*.pkl", "*.bin.index.json", "*.distcp"


def check_weights(folder: Path, config: Any) -> None:
    """Refuse a folder whose weights are not complete safetensors files in it.

    Parameters
    ----------
    folder
        The model's.
    config
        The text part of its configuration.

    Raises
    ------
    ModelError
        When weights are pickled, elsewhere, missing or damaged, belong to an adapter, or are far fewer than the
        configuration says.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter, not a model: open an engine on the model that it was trained for, and give "
            "this folder as the adapter of requests (SamplingParams.adapter, --adapter)"
        )
    if (generation := folder / "generation_config.json").exists():
        read_json(generation)  # transformers ignores one that it cannot read, and answers would not end
    files = weight_files(folder)
    for file in files:
        _check_tensors(file)
    # memory would be allocated for all missing weights
    heads, head_dim = (
        min(one or 1 for one in layer_values(config, key)) for key in ("num_attention_heads", "head_dim")
    )
    fewest = config.hidden_size * (config.vocab_size + config.num_hidden_layers * heads * head_dim)
    if fewest > 8 * sum(file.stat().st_size for file in files):
        raise ModelError(
            f"the configuration in {folder} is of a model with more than {fewest} weights, for which its files are too "
            "small: download it again"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model.

    Raises
    ------
    ModelError
        When it has none in its folder.
    """
    return list(_found(folder))


def _found(folder: Path) -> Iterator[Path]:
    if (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink():
        yield _inside(folder, WEIGHTS)
        return
    if (folder / INDEX).exists():
        yield from sorted({_inside(folder, name) for name in _indexed(folder / INDEX)})
        return
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"the weights in {folder} are pickled ({pickled[0]}), and reading a pickle can run code: convert them "
            "where you trust them (load the model with transformers and call save_pretrained, which writes "
            "safetensors), or download a version with safetensors"
        )
    raise ModelError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}; give one saved by save_pretrained")


def _indexed(index: Path) -> Iterator[str]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ModelError(f"{index} has no weight_map from weights to files: download the model again")
    yield from where.values()


def _inside(folder: Path, name: str) -> Path:
    """The weights' file of this name in the folder itself."""
    file = folder / name
    if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
        raise ModelError(f"{folder / INDEX} names {name!r:.200}: weights are safetensors files in the folder itself")
    if not file.is_file():
        raise ModelError(f"{file} is missing, or is not a file: download the model again")
    refuse_pointer(file)
    real, home = file.resolve(), folder.resolve()
    cache = home.parent.parent / "blobs"  # the targets of links in the hub's cache
    if home not in real.parents and cache not in real.parents:
        raise ModelError(
            f"{file} is a link to {real}, outside the folder: copy the file here, or give the other folder"
        )
    return file


def _check_tensors(file: Path) -> None:
    from safetensors import safe_open

    try:
        with safe_open(file, framework="np") as opened:
            names = list(opened.keys())
    except Exception as error:  # safetensors' own error derives from no other
        raise ModelError(f"{file} is damaged or cut short, download it again: {error}") from error
    if not names:
        raise ModelError(f"{file} holds no weights: download it again")
