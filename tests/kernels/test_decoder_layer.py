"""Operations of the C++ core between products equal torch's, rounded where transformers' modules round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distkv_dask.kernels import few_rows, native_kernel
from distkv_dask.kernels.decoder_layer import DecoderLayer, Norm, Parts, is_served
from distkv_dask.kernels.few_rows import FewRows

pytestmark = pytest.mark.skipif(native_kernel.missing() is not None, reason="no C++ core")
SETS = [few_rows.MODEL, *few_rows.sets()]
ROWS = [1, 5, 16, 40]


def linear(outputs: int, inputs: int, name: str, bias: bool = False) -> FewRows:
    weight = torch.randn(outputs, inputs).bfloat16() / inputs**0.5
    added = torch.randn(outputs).bfloat16() if bias else None
    return FewRows(few_rows.packed(weight.bfloat16()), (outputs, inputs), added, ((512, name),))


def norm(size: int, epsilon: float = 1e-5) -> Norm:
    return Norm((torch.rand(size) + 0.5).bfloat16(), epsilon)


def parts(name: str, size: int = 96, middle: int = 160, heads: int = 3, kv_heads: int = 1, *, normed: bool) -> Parts:
    torch.manual_seed(size + middle)
    d = 64
    return Parts(
        query=linear(heads * d, size, name, bias=True),
        key=linear(kv_heads * d, size, name, bias=True),
        value=linear(kv_heads * d, size, name),
        output=linear(size, heads * d, name),
        gate=linear(middle, size, name),
        up=linear(middle, size, name),
        down=linear(size, middle, name, bias=True),
        norm=norm(size),
        mlp_norm=norm(size, 1e-3),
        query_norm=norm(d, 1e-6) if normed else None,
        key_norm=norm(d, 1e-6) if normed else None,
        head_dim=d,
    )


def normed_by(of: Norm, x: Tensor) -> Tensor:
    wide = x.float()
    return of.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + of.epsilon)).bfloat16()


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosines[:, None] + torch.cat((-second, first), -1) * sines[:, None]


def angles(rows: int, d: int = 64) -> tuple[Tensor, Tensor]:
    turns = torch.arange(rows)[:, None] * 0.7 ** torch.arange(d // 2)[None]
    both = torch.cat((turns, turns), -1)
    return both.cos().bfloat16(), both.sin().bfloat16()


def assert_alike(found: Tensor, right: Tensor) -> None:
    """Check that all but a few results have the same bits: sums in another order may be rounded the other way."""
    assert found.shape == right.shape
    assert (found != right).float().mean() < 0.02
    torch.testing.assert_close(found.float(), right.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("normed", [False, True])
def test_queries_keys_and_values_are_those_of_torch(name: str, rows: int, normed: bool) -> None:
    of = parts(name, normed=normed)
    hidden, (cosines, sines) = torch.randn(rows, 96).bfloat16(), angles(rows)
    found = DecoderLayer(of).before_attention(hidden, cosines, sines)
    inputs = normed_by(of.norm, hidden)
    query, key, value = (one(inputs).view(rows, -1, 64) for one in (of.query, of.key, of.value))
    if of.query_norm is not None and of.key_norm is not None:
        query, key = normed_by(of.query_norm, query), normed_by(of.key_norm, key)
    for one, right in zip(found, (turned(query, cosines, sines), turned(key, cosines, sines), value), strict=True):
        assert_alike(one, right)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("rows", ROWS)
def test_hidden_states_after_the_layer_are_those_of_torch(name: str, rows: int) -> None:
    of = parts(name, normed=False)
    hidden, attended = torch.randn(rows, 96).bfloat16(), torch.randn(rows, 3, 64).bfloat16()
    found = DecoderLayer(of).after_attention(hidden, attended)
    added = hidden + of.output(attended.flatten(1))
    inputs = normed_by(of.mlp_norm, added)
    assert_alike(found, added + of.down(functional.silu(of.gate(inputs)) * of.up(inputs)))


@pytest.mark.parametrize("name", SETS)
def test_activations_of_any_size_are_those_of_torch(name: str) -> None:
    """A layer whose gates are its hidden states, normed to any size, and whose MLP otherwise passes them on."""
    identity, nothing = torch.eye(32).bfloat16(), torch.zeros(32, 32).bfloat16()
    ones, sizes = torch.ones(32).bfloat16(), Norm(torch.logspace(-6, 2.5, 32).bfloat16(), 1e-5)

    def product(weight: Tensor, bias: Tensor | None = None) -> FewRows:
        return FewRows(few_rows.packed(weight), (32, 32), bias, ((64, name),))

    one, zero = product(identity), product(nothing)
    layer = DecoderLayer(Parts(one, one, one, zero, one, product(nothing, ones), one, sizes, sizes, None, None, 32))
    hidden = torch.randn(50, 32).bfloat16()
    gates = normed_by(sizes, hidden)
    assert gates.max() > 300
    assert gates.min() < -300
    found = layer.after_attention(hidden, torch.zeros(50, 1, 32).bfloat16())
    assert_alike(found, hidden + functional.silu(gates))


@pytest.mark.parametrize("name", SETS)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(name: str) -> None:
    layer = DecoderLayer(parts(name, normed=True))
    hidden, attended, (cosines, sines) = torch.randn(40, 96).bfloat16(), torch.randn(40, 3, 64).bfloat16(), angles(40)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = *layer.before_attention(hidden, cosines, sines), layer.after_attention(hidden, attended)
    finally:
        torch.set_num_threads(threads)
    for row in (slice(0, 1), slice(7, 12), slice(39, 40)):
        alone = (
            *layer.before_attention(hidden[row], cosines[row], sines[row]),
            layer.after_attention(hidden[row], attended[row]),
        )
        assert all(torch.equal(one, all_[row]) for one, all_ in zip(alone, together, strict=True))


def test_what_is_no_number_stays_none() -> None:
    layer = DecoderLayer(parts(few_rows.MODEL, normed=False))
    hidden = torch.randn(2, 96).bfloat16()
    hidden[1, 3] = float("nan")
    found = layer.after_attention(hidden, torch.zeros(2, 3, 64).bfloat16())
    assert found[1].isnan().all()
    assert not found[0].isnan().any()


def test_sizes_and_norms_that_the_core_does_not_take_are_refused() -> None:
    good = parts(few_rows.MODEL, normed=True)
    assert is_served(good)
    wrong = (
        {"gate": linear(128, 96, few_rows.MODEL)},
        {"output": linear(96, 128, few_rows.MODEL)},
        {"head_dim": 32},
        {"key_norm": None},
        {"key_norm": norm(64, 1e-3)},
        {"norm": norm(64)},
        {"mlp_norm": Norm(torch.ones(96), 1e-5)},
    )
    fields = {name: getattr(good, name) for name in good.__slots__}
    for change in wrong:
        other = Parts(**fields | change)
        assert not is_served(other), change
        with pytest.raises(ValueError, match="is_served"):
            DecoderLayer(other)
    assert not is_served(parts(few_rows.MODEL, size=80, normed=False))
