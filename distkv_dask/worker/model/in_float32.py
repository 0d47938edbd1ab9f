"""Runs a 16-bit model in float32, a module at a time, so that rounding does not hide or fake a difference.

There is never a second copy of the model: small weights are widened while their layer runs, large ones during their own
call, and the largest (experts) stay in 16 bits, between two conversions. Embeddings and heads over a large vocabulary
are not copied: rows are looked up and then widened, and products are computed for some rows of the weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_SHORT = (torch.bfloat16, torch.float16)
_SMALL, _LARGE = 64 << 20, 2 << 30
"""Bytes of a module's own weights in float32: up to the first it is widened with its layer, up to the second alone."""


@contextmanager
def in_float32(model: Any, layers: nn.ModuleList | None) -> Iterator[bool]:
    """Run a model in float32 for a while; yields whether all parts of it run in float32.

    Parameters
    ----------
    model
        A transformers model.
    layers
        Its decoder layers, if they are known: only one of them is widened at a time.
    """
    if model.dtype not in _SHORT or getattr(model, "hf_quantizer", None) is not None:
        yield model.dtype == torch.float32
        return
    inner = {module for module in (layers.modules() if layers is not None else ())}
    with ExitStack() as stack:
        whole = True
        for module in model.modules():
            size = _size(module)
            if size > _SMALL and module not in inner and _is_table(module):
                _widen_rows(stack, module)
            elif size > _LARGE:
                _hook(stack, module, _narrowed_inputs, _widened_output)
                whole = False
            elif size > _SMALL:
                _widen_calls(stack, module, [module])
            elif size and module not in inner:
                stack.enter_context(_widened([module]))
        for layer in layers if layers is not None else ():
            _widen_calls(stack, layer, [one for one in layer.modules() if _size(one) <= _SMALL])
        yield whole


def _short(module: nn.Module) -> Iterator[Tensor]:
    """A module's own weights and buffers of 16 bits."""
    # a buffer of inference mode was made in a call, as CTRL's are
    buffers = (buffer for buffer in module.buffers(recurse=False) if not buffer.is_inference())
    for tensor in (*module.parameters(recurse=False), *buffers):
        if tensor.dtype in _SHORT:
            yield tensor


def _size(module: nn.Module) -> int:
    """Bytes of its own weights in float32."""
    return 4 * sum(weight.numel() for weight in _short(module))


@contextmanager
def _widened(modules: Iterable[nn.Module]) -> Iterator[None]:
    tensors = [tensor for module in modules for tensor in _short(module)]
    with torch.inference_mode(False):  # otherwise only inference mode could use these tensors afterwards
        before = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.float()
    try:
        yield
    finally:
        with torch.inference_mode(False):
            for tensor, data in zip(tensors, before, strict=True):
                tensor.data = data


def _widen_calls(stack: ExitStack, called: nn.Module, modules: list[nn.Module]) -> None:
    """Widen modules whenever one of them, or their layer, is called."""
    running = ExitStack()

    def before(*_: Any) -> None:
        running.enter_context(_widened(modules))

    def after(*_: Any) -> None:
        running.close()

    _hook(stack, called, before, after)
    stack.callback(running.close)


def _is_table(module: nn.Module) -> bool:
    """Whether a module is a plain embedding or linear, with rows for the tokens of a vocabulary."""
    return type(module) in (nn.Embedding, nn.Linear) and "forward" not in vars(module)


def _widen_rows(stack: ExitStack, table: Any) -> None:
    """Let an embedding or head compute in float32 without a copy of it."""
    table.forward = partial(_looked_up if isinstance(table, nn.Embedding) else _multiplied, table)
    stack.callback(delattr, table, "forward")


def _looked_up(table: nn.Embedding, ids: Tensor) -> Tensor:
    return table.weight[ids].float()


def _multiplied(table: nn.Linear, rows: Tensor) -> Tensor:
    some = table.weight.split(max(1, _SMALL // 4 // table.in_features))
    product = torch.cat([nn.functional.linear(rows.float(), part.float()) for part in some], -1)
    return product if table.bias is None else product + table.bias.float()


def _hook(stack: ExitStack, module: nn.Module, before: Any, after: Any) -> None:
    stack.callback(module.register_forward_pre_hook(before, with_kwargs=before is _narrowed_inputs).remove)
    stack.callback(module.register_forward_hook(after).remove)


def _narrowed_inputs(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    convert = partial(_converted, dtype=next(_short(module)).dtype)
    return tuple(map(convert, args)), {name: convert(value) for name, value in keywords.items()}


def _widened_output(module: nn.Module, _: Any, output: Any) -> Any:
    return tuple(map(_converted, output)) if isinstance(output, tuple) else _converted(output)


def _converted(value: Any, dtype: torch.dtype = torch.float32) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
