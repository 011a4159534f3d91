"""A safetensors header has one meaning, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from models.headers import HEADER_BYTES_MOST, HeaderInvalid, check_header

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]},
    "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
    "none": {"dtype": "F32", "shape": [0, 7], "data_offsets": [28, 28]},
}


def file(header: object, data: bytes = bytes(28)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def check(data: bytes) -> None:
    check_header(data, len(data))


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    header = json.loads(json.dumps(GOOD))
    change(header)
    return file(header)


def test_a_good_one_passes_padded_or_not() -> None:
    check(file(GOOD))
    check(file(json.dumps(GOOD).encode() + b"   "))
    assert len(deserialize(file(GOOD))) == 3  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02\0\0",
        file({}, b"x"),
        file(b""),
        file(b" {}", b""),
        file(b"[]", b""),
        file(b"{", b""),
        file(b'{"a": 1}', b""),
        file(GOOD, bytes(27)),
        file(GOOD, bytes(29)),
        file(GOOD)[:-40],
        (HEADER_BYTES_MOST + 1).to_bytes(8, "little") + b"{}",
        b"\xff" * 8 + b"{}",
        file(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        changed(lambda each: each["a"].update(dtype="F33")),
        changed(lambda each: each["a"].update(shape=[3])),
        changed(lambda each: each["a"].update(shape=[-1, -2])),
        changed(lambda each: each["a"].update(shape=[True, 2])),
        changed(lambda each: each["a"].update(extra=1)),
        changed(lambda each: each["a"].update(data_offsets=[0, 4, 8])),
        changed(lambda each: each["b"].update(data_offsets=[2, 26])),
        changed(lambda each: each.update(__metadata__={"format": 1})),
        changed(lambda each: each.update(__metadata__=["x"])),
        changed(lambda each: each.pop("a")),
        b"PK\x03\x04" + bytes(200),
        b"\x80\x02c__builtin__\neval\n" + bytes(200),
    ],
    ids=range(26),
)
def test_an_odd_one_is_refused(data: bytes) -> None:
    with pytest.raises(HeaderInvalid):
        check(data)


@given(place=st.integers(0, len(file(GOOD)) - 29), byte=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_what_the_library_refuses_is_refused_here(place: int, byte: int) -> None:
    data = bytearray(file(GOOD))
    data[place] = byte
    try:
        deserialize(bytes(data))  # type: ignore[no-untyped-call]
    except SafetensorError:
        with pytest.raises(HeaderInvalid):
            check(bytes(data))
