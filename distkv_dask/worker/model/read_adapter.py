"""Reading an adapter, with all checks before it is computed: peft determines what it changes in a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distkv_dask.adapter import Adapter
from distkv_dask.errors import AdapterError, in_words
from distkv_dask.models.adapter_files import CONFIG, WEIGHTS, fingerprint_of, read_adapter
from distkv_dask.worker.model.lora import LoraWeights

Weights = dict[str, LoraWeights]
"""An adapter's weights, by the names of the linears that it changes."""


def bytes_of(weights: Weights) -> int:
    """Bytes of an adapter's weights."""
    return sum(one.down.nbytes + one.up.nbytes for one in weights.values())


def read_weights(adapter: Adapter, model: Any) -> Weights:
    """Read an adapter's weights, and check that they are for a model.

    Parameters
    ----------
    adapter
        The adapter that the client saw.
    model
        The transformers model.

    Raises
    ------
    MissingProgramError
        When peft is not installed.
    AdapterError
        When its files are not those that the client saw, or are for another model.
    """
    from safetensors.torch import load

    read_adapter(adapter.path)  # its errors are clearer than the later ones
    folder = Path(adapter.path)
    try:
        contents = [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    except OSError as error:
        raise AdapterError(f"the adapter in {folder} cannot be read: {in_words(error)}") from error
    if fingerprint_of(iter(contents)) != adapter.fingerprint:
        raise AdapterError(
            f"the adapter in {folder} is not the one that the client saw: it was changed since then, or the path leads "
            "somewhere else on this worker"
        )
    tensors = load(contents[1])
    changes = changes_of(folder, model)
    made = {
        name: LoraWeights(_tensor(tensors, name, "A", folder), _tensor(tensors, name, "B", folder), one.scaling)
        for name, one in changes.items()
    }
    unknown = (name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors)
    if others := sorted({*unknown} - made.keys()):
        raise AdapterError(
            f"the adapter in {folder} has weights for {others[0]:.200}, but its target_modules name no such linear "
            "layer of this model: was it trained for another one?"
        )
    for name, weights in made.items():
        _check_shapes(name, weights, model.get_submodule(name), folder)
        if len(weights.down) != changes[name].rank:
            raise AdapterError(
                f"the adapter in {folder} has weights of rank {len(weights.down)} for {name}, but its config says "
                f"{changes[name].rank}: save it again"
            )
    return made


PREFIX = "base_model.model."
"""Start of the names of an adapter's weights."""


class Change(NamedTuple):
    """An adapter's configuration of a linear: the rank of its contribution, and the factor."""

    rank: int
    scaling: float


def changes_of(folder: Path, model: Any) -> dict[str, Change]:
    """The linears of a model that an adapter changes, by their names, as peft determines them.

    peft puts the adapter into a model of the same class and sizes that has no weights.

    Raises
    ------
    AdapterError
        When the model does not have its modules, or they are not linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.init_lora_weights, config.inference_mode = False, True
        with torch.device("meta"):
            bare = type(model)(copy.deepcopy(model.config))
            inject_adapter_in_model(config, bare)
    except Exception as error:  # peft may raise any error for a faulty configuration
        raise AdapterError(f"the adapter in {folder} does not fit the model: {in_words(error)}") from error
    found: dict[str, Change] = {}
    own = dict(model.named_modules())
    head = model.get_output_embeddings()
    for name, layer in bare.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        linear = own.get(name)
        if type(layer) is not Linear or layer.lora_variant or not _is_linear(linear) or linear is head:
            raise AdapterError(
                f"the adapter in {folder} changes {name}, which is {_words(linear, head)}; only linear layers within "
                "the model are computed with adapters: merge it into the model (peft's merge_and_unload)"
            )
        found[name] = Change(layer.r["default"], float(layer.scaling["default"]))
    return found


def _is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer with plain weights; some old models have them as a convolution."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _words(module: nn.Module | None, head: nn.Module | None) -> str:
    if module is None:
        return "not a part that this engine loads"
    return "the model's head" if module is head else f"a {type(module).__name__}"


def _tensor(tensors: Mapping[str, Tensor], name: str, part: str, folder: Path) -> Tensor:
    """A weight of an adapter in float32, as peft computes with it."""
    found = tensors.get(f"{PREFIX}{name}.lora_{part}.weight")
    if found is None:
        raise AdapterError(f"the adapter in {folder} has no weights for {name}, which it should change: save it again")
    return found.float()


def _check_shapes(name: str, weights: LoraWeights, linear: Any, folder: Path) -> None:
    shape = tuple(linear.weight.shape)
    inner, outer = shape if type(linear) is not nn.Linear else shape[::-1]
    if weights.down.shape[1] != inner or weights.up.shape[0] != outer:
        raise AdapterError(
            f"the adapter in {folder} is for another model: {name} takes {inner} numbers and gives {outer} here, but "
            f"{weights.down.shape[1]} and {weights.up.shape[0]} in the adapter"
        )
