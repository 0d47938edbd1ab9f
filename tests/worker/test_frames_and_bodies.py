"""Frames and bodies are read as they were sent, and anything else is refused with one kind of error."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distkv_dask.errors import ChannelError, GangAbortedError, PlanError
from distkv_dask.worker.channels import bodies
from distkv_dask.worker.channels.bodies import Hello, Row, decode_hello, decode_rows, encode_hello, encode_rows
from distkv_dask.worker.channels.frames import (
    FAILURE_BYTES,
    HEADER_BYTES,
    MESSAGE_BYTES,
    NOBODY,
    Header,
    Kind,
    checked,
    failed,
    failure_frame,
    parse_header,
    rest_of_frame,
)

headers = st.builds(
    Header,
    st.sampled_from(Kind),
    gang=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    layer=st.integers(0, 2**16 - 1),
    step=st.integers(0, 2**32 - 1),
    length=st.integers(0, 2**64 - 1),
    scale=st.floats(allow_nan=False),
)


@given(headers, st.binary(max_size=20))
def test_a_header_is_read_as_it_was_written_whatever_follows_it(header: Header, more: bytes) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_BYTES == 64
    assert parse_header(packed + more) == header


def test_cpp_and_python_have_the_fields_of_a_header_in_the_same_places() -> None:
    cpp = (Path(bodies.__file__).parents[1] / "native" / "frames.h").read_text()
    offsets = {name: int(at) for name, at in re.findall(r"offsetof\(Header, (\w+)\) == (\d+)", cpp)}
    kinds = {"kind": "B", "layer": "H", "step": "I", "epoch": "I", "gang": "Q", "length": "Q", "scale": "d"}
    assert offsets.pop("magic") == 0
    assert offsets.keys() == kinds.keys()
    header = Header(Kind.ATTEND, 2**40, 2**20, 2**10, 2**30, 2**50, 0.5)
    for name, at in offsets.items():
        assert struct.unpack_from(f"<{kinds[name]}", header.pack(), at) == (getattr(header, name),)


@given(headers, st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_a_header_with_another_byte_is_another_header_or_none(header: Header, at: int, change: int) -> None:
    packed = bytearray(header.pack())
    packed[at] ^= change
    padding = at == 5 or at >= 40  # bytes that mean nothing
    assert (parse_header(packed) == header) == padding


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES).filter(lambda data: data[:4] != b"DKV1"))
def test_bytes_of_something_else_are_no_header(data: bytes) -> None:
    assert parse_header(data) is None
    assert parse_header(b"DKV2" + Header(Kind.END).pack()[4:]) is None


@given(headers, st.integers(0, 2**64 - 1))
def test_a_header_that_announces_no_more_than_is_expected_is_taken(header: Header, maximum: int) -> None:
    if header.length > maximum:
        with pytest.raises(ChannelError, match=f"at most {maximum} bytes"):
            checked("peer", header, maximum)
    else:
        assert checked("peer", header, maximum) is header
    with pytest.raises(ChannelError, match="no frame"):
        checked("peer", None, maximum)


@given(headers, st.lists(st.binary(max_size=9), max_size=4), st.data())
def test_what_is_left_of_a_frame_is_the_frame_without_what_has_left(
    header: Header, buffers: list[bytes], data: st.DataObject
) -> None:
    whole = header.pack() + b"".join(buffers)
    sent = data.draw(st.integers(0, len(whole)))
    assert b"".join(rest_of_frame(sent, header, buffers)) == whole[sent:]


@given(st.integers(0, 2**40), st.integers(0, 99), st.text(max_size=60), st.integers(NOBODY, 2**62))
@example(1, 1, "x" * (MESSAGE_BYTES + 9), 0)
@example(1, 1, "é" * MESSAGE_BYTES, 3)
@example(1, 1, "\ud800", NOBODY)
def test_a_failure_says_at_the_other_end_whose_it_is_and_why(gang: int, epoch: int, text: str, culprit: int) -> None:
    packed, payload = failure_frame(gang, epoch, text, culprit)
    header = parse_header(packed)
    assert header is not None
    assert (header.kind, header.gang, header.epoch, header.length) == (Kind.FAIL, gang, epoch, len(payload))
    assert len(payload) <= FAILURE_BYTES
    error = failed("peer", payload)
    if culprit == NOBODY:
        assert type(error) is GangAbortedError
    else:
        assert isinstance(error, PlanError)
        assert error.sequence == culprit
    said = str(error).removeprefix("peer failed: ")
    whole = text.encode(errors="replace").decode()
    assert whole.startswith(said.removesuffix("\N{REPLACEMENT CHARACTER}"))
    assert len(said.encode()) >= min(len(whole.encode()), MESSAGE_BYTES - 3)


def test_a_failure_that_was_cut_short_is_still_one() -> None:
    _, payload = failure_frame(1, 1, "a reason", 7)
    for length in range(len(payload)):
        assert isinstance(failed("peer", payload[:length]), GangAbortedError | PlanError)


# Bodies

spans = st.lists(st.integers(0, 2**50), max_size=6).map(sorted).map(lambda e: tuple(zip(e[::2], e[1::2], strict=False)))
positions = st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=4)
rows = st.builds(
    lambda joined, each, **fields: Row(queries=len(joined) * each, positions=tuple(joined), **fields),
    sequence=st.integers(0, 2**62 - 1),
    length=st.integers(0, 2**62 - 1),
    each=st.integers(1, 2**29 - 1),
    appends=st.booleans(),
    spans=spans,
    joined=positions,
)


@given(st.lists(rows, max_size=4))
def test_rows_are_read_as_they_were_written(batch: list[Row]) -> None:
    assert decode_rows(encode_rows(batch)) == batch


leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4)
anything = st.recursive(
    leaves | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)
nearly_rows = st.lists(
    st.tuples(
        st.integers(-3, 2**62 + 1), st.integers(-1, 9), st.integers(-1, 2**31), st.booleans() | st.integers(0, 1),
        st.lists(st.lists(st.integers(-1, 9) | st.booleans(), max_size=3) | st.integers(0, 3), max_size=4),
        st.lists(st.integers(-1, 2**62) | st.booleans(), max_size=3),
    ).map(list),
    max_size=2,
)  # fmt: skip


@given(anything | nearly_rows)
@example([[1, 4, 1, False, [[1, 2, 3], [4]], [4]]])
@example([[1, 4, 1, False, [[], [1, 2, 3, 4]], [4]]])
@example([[1, 4, 0, False, [], [4]]])
@example([[1, 4, 1, False, [[4, 2]], [4]]])
@example([[1, 4, 1, False, [[True, 2]], [4]]])
@example([[1, 4, 1, False, [[0, 4]], []]])
@example([[1, 4, 3, False, [[0, 4]], [4, 4]]])
@example([[1, 4, 1, False, [[0, 4]], [True]]])
def test_rows_that_make_no_sense_are_refused_by_a_channels_error(body: Any) -> None:
    try:
        read = decode_rows(msgpack.packb(body))
    except ChannelError:
        return
    assert [[*row[:4], [list(span) for span in row.spans], [*row.positions]] for row in read] == body
    for row in read:
        ends = [end for span in row.spans for end in span]
        assert ends == sorted(ends)
        assert all(type(end) is int and end >= 0 for end in ends)
        assert row.sequence >= 0
        assert row.length >= 0
        assert row.queries >= 1
        assert type(row.appends) is bool
        assert row.queries % len(row.positions) == 0
        assert all(type(one) is int and one >= 0 for one in row.positions)


@given(st.binary(max_size=60))
def test_bytes_of_any_kind_are_rows_or_refused(data: bytes) -> None:
    with contextlib.suppress(ChannelError):
        assert all(isinstance(row, Row) for row in decode_rows(data))


HELLO = Hello("engine", "tcp://home", 3, 4, 2, 8, "float32", "a=full; aaa", 0)


def test_a_hello_is_read_as_it_was_written_and_shows_the_digest_of_the_token_only() -> None:
    payload = encode_hello(b"secret", HELLO)
    assert decode_hello(payload) == HELLO
    assert payload.startswith(bodies.token_digest(b"secret"))
    assert b"secret" not in payload


@given(anything | st.lists(st.text(max_size=2) | st.integers(0, 9) | st.booleans(), min_size=9, max_size=9))
@example(["engine", "home", True, 4, 2, 8, "float32", "a=full; aaa", 0])
@example(["engine", "home", 3, 4, 2, 8, "float32", "a=full; aaa"])
def test_a_hello_of_other_fields_is_refused(body: Any) -> None:
    payload = bytes(bodies.DIGEST_BYTES) + msgpack.packb(body)
    try:
        read = decode_hello(payload)
    except ChannelError:
        return
    assert list(read) == body
    assert [type(one) for one in read] == [str, str, int, int, int, int, str, str, int]
