"""A layer's exchange without Python: plain sockets use it, and failures still give our errors."""

from __future__ import annotations

import ctypes
import struct

import pytest
from _channels import TCP, WAYS, Way
from _fakes import fleet, generate, loaded, reference

from distkv_dask.kernels import native_kernel
from distkv_dask.worker.holder import session
from distkv_dask.worker.holder.native_turns import NativeTurns
from distkv_dask.worker.home import attention
from distkv_dask.worker.home.native_exchange import NativeExchange
from distkv_dask.worker.native import wire as native_wire


@pytest.mark.skipif(native_wire.wire() is None, reason="the C++ libraries were not built")
@pytest.mark.parametrize("way", WAYS, indirect=True, ids=lambda way: way.name)
def test_plain_sockets_are_served_in_cpp_and_others_in_python(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges, turns = [], []
    new_exchange, new_turns = attention.new_exchange, session.new_turns
    monkeypatch.setattr(
        attention, "new_exchange", lambda *given: exchanges.append(new_exchange(*given)) or exchanges[-1]
    )
    monkeypatch.setattr(session, "new_turns", lambda *given: turns.append(new_turns(*given)) or turns[-1])
    with fleet(loaded("llama-gqa"), 3, way) as made:
        placement = made.place(1, ("w1", 32), ("w2", 32), ("w0", 48))
        assert generate(made, placement, "w0") == reference("llama-gqa").tokens
    plain = way.native and not way.encrypted and way.channel != "ucx"
    assert exchanges
    assert {isinstance(one, NativeExchange) for one in exchanges} == {plain}
    assert {isinstance(one, NativeTurns) for one in turns} == {plain}


@pytest.mark.skipif(native_wire.wire() is None, reason="the C++ libraries were not built")
def test_a_session_counts_what_was_answered_in_cpp() -> None:
    with fleet(loaded("llama-gqa"), 2, TCP) as made:
        placement = made.place(1, ("w1", 80), ("w0", 32))
        ended, runtime = [], made.members["w1"].runtime
        open_session = runtime.open_session
        runtime.open_session = lambda gang: ended.append(open_session(gang)) or ended[-1]  # type: ignore[method-assign]
        generate(made, placement, "w0", window=100)
        stats = ended[-1].wait(5)
    model = loaded("llama-gqa").geometry
    assert stats.requests % model.layers == 0
    assert stats.requests > 0
    assert stats.bytes_out == stats.requests * model.heads * (model.head_dim + 1) * 4
    assert stats.busy_seconds > 0


@pytest.mark.skipif(native_wire.wire() is None, reason="the C++ libraries were not built")
@pytest.mark.parametrize("name", native_wire.STRUCTURES)
def test_a_library_that_lays_a_structure_out_differently_is_not_used(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer(native_wire.STRUCTURES[name]):
        _fields_ = (("added", ctypes.c_int64),)

    native_wire.wire.cache_clear()
    monkeypatch.setitem(native_wire.STRUCTURES, name, Longer)
    try:
        assert native_wire.wire() is None
    finally:
        native_wire.wire.cache_clear()


@pytest.mark.skipif(native_kernel.missing() is not None, reason="the C++ libraries were not built")
def test_a_core_whose_arguments_have_another_order_or_size_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    native_kernel._load.cache_clear()
    monkeypatch.setattr(native_kernel, "_ARGS", struct.Struct("<26qd"))
    try:
        assert "another version" in (native_kernel.missing() or "")
    finally:
        native_kernel._load.cache_clear()
