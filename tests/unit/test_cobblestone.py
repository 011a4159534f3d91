"""Sealed streams: Wycheproof's vectors through both ways to open, and properties of what we seal ourselves."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cobblestone
from cobblestone import CHUNK_BYTES, NotAuthentic, Reader, Writer

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "assets" / "cobblestone_vectors.json").read_text()
)["tests"]
KEY = bytes(range(32))
CONTEXT = b"pericarp test"
SIZES = st.sampled_from([0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 77])


def plain(size: int) -> bytes:
    return hashlib.shake_256(b"plain").digest(size)


def sealed(data: bytes, key: bytes = KEY, context: bytes = CONTEXT) -> bytes:
    target = io.BytesIO()
    assert cobblestone.encrypt(io.BytesIO(data), target, key, context) == len(data)
    return target.getvalue()


def streamed(data: bytes, key: bytes = KEY, context: bytes = CONTEXT) -> bytes:
    target = io.BytesIO()
    count = cobblestone.decrypt(io.BytesIO(data), target, key, context)
    assert count == len(target.getvalue())
    return target.getvalue()


def at_random(data: bytes, key: bytes = KEY, context: bytes = CONTEXT) -> bytes:
    return io.BufferedReader(Reader(io.BytesIO(data), key, context)).read()


def named(vectors: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(vector, id=f"{vector['tcId']}-{vector['comment']}") for vector in vectors]


WAYS = pytest.mark.parametrize("opened", [streamed, at_random])


@WAYS
@pytest.mark.parametrize("vector", named(VECTORS))
def test_wycheproof(vector: dict[str, Any], opened: Any) -> None:
    key, context = bytes.fromhex(vector["key"]), bytes.fromhex(vector["ctx"])
    ciphertext = zlib.decompress(bytes.fromhex(vector["ct"]))
    if vector["result"] == "valid":
        message = opened(ciphertext, key, context)
        assert (len(message), hashlib.sha512(message).hexdigest()) == (
            vector["msgLength"],
            vector["msgSha512"],
        )
        assert cobblestone.sealed_size(len(message)) == len(ciphertext)
        return
    with pytest.raises(ValueError if "InvalidKeySize" in vector["flags"] else NotAuthentic):
        opened(ciphertext, key, context)


@pytest.mark.parametrize("vector", named([each for each in VECTORS if each["result"] == "invalid"]))
def test_a_stream_gives_no_byte_past_the_authentic_prefix_and_a_reader_knows_the_length(
    vector: dict[str, Any],
) -> None:
    key, context = bytes.fromhex(vector["key"]), bytes.fromhex(vector["ctx"])
    ciphertext = zlib.decompress(bytes.fromhex(vector["ct"]))
    target = io.BytesIO()
    refusal = ValueError if "InvalidKeySize" in vector["flags"] else NotAuthentic
    with pytest.raises(refusal):
        cobblestone.decrypt(io.BytesIO(ciphertext), target, key, context)
    assert len(target.getvalue()) <= vector.get("msgLength", 0)
    if "ValidFinalChunk" not in vector["flags"]:
        with pytest.raises(refusal):
            Reader(io.BytesIO(ciphertext), key, context)


@WAYS
@given(size=SIZES)
@settings(max_examples=12, deadline=None)
def test_what_was_sealed_opens(opened: Any, size: int) -> None:
    ciphertext = sealed(plain(size))
    assert len(ciphertext) == cobblestone.sealed_size(size)
    assert cobblestone.plain_size(len(ciphertext)) == size
    assert opened(ciphertext) == plain(size)


@WAYS
@given(size=SIZES, place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_a_flipped_bit_is_found(opened: Any, size: int, place: float, bit: int) -> None:
    ciphertext = bytearray(sealed(plain(size)))
    ciphertext[int(place * len(ciphertext))] ^= 1 << bit
    with pytest.raises(NotAuthentic):
        opened(bytes(ciphertext))


@WAYS
@given(size=SIZES, kept=st.floats(0, 1, exclude_max=True))
@settings(max_examples=30, deadline=None)
def test_a_part_of_it_does_not_open(opened: Any, size: int, kept: float) -> None:
    ciphertext = sealed(plain(size))
    with pytest.raises(NotAuthentic):
        opened(ciphertext[: int(kept * len(ciphertext))])


@WAYS
def test_it_opens_under_no_other_key_or_context(opened: Any) -> None:
    ciphertext = sealed(plain(100))
    with pytest.raises(NotAuthentic):
        opened(ciphertext, cobblestone.new_key())
    with pytest.raises(NotAuthentic):
        opened(ciphertext, KEY, CONTEXT + b"2")


@given(
    size=SIZES,
    reads=st.lists(st.tuples(st.integers(0, 4 * CHUNK_BYTES), st.integers(0, 3 * CHUNK_BYTES)), max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_a_reader_reads_as_the_plain_file_does(size: int, reads: list[tuple[int, int]]) -> None:
    reader = io.BufferedReader(Reader(io.BytesIO(sealed(plain(size))), KEY, CONTEXT))
    file = io.BytesIO(plain(size))
    assert reader.seek(0, io.SEEK_END) == size
    for place, length in reads:
        assert reader.seek(place) == file.seek(place)
        assert reader.read(length) == file.read(length)


def test_a_reader_opens_only_what_is_read() -> None:
    ciphertext = bytearray(sealed(plain(3 * CHUNK_BYTES)))
    ciphertext[56 + CHUNK_BYTES + 16] ^= 1  # in chunk 1
    reader = Reader(io.BytesIO(ciphertext), KEY, CONTEXT)
    assert reader.read(10) == plain(10)
    reader.seek(2 * CHUNK_BYTES)
    assert reader.read(10) == plain(3 * CHUNK_BYTES)[2 * CHUNK_BYTES :][:10]
    reader.seek(CHUNK_BYTES)
    with pytest.raises(NotAuthentic):
        reader.read(1)
    with pytest.raises(ValueError):
        reader.seek(-1)


def test_a_writer_left_by_an_error_leaves_what_does_not_open() -> None:
    target = io.BytesIO()
    with pytest.raises(OSError), Writer(target, KEY, CONTEXT) as writer:
        writer.write(plain(2 * CHUNK_BYTES))
        raise OSError("the source broke")
    with pytest.raises(NotAuthentic):
        streamed(target.getvalue())


def test_raw_files_that_take_and_give_little_at_a_time_lose_nothing() -> None:
    class Drip(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(1_000, size or 0))

        def write(self, data: Any, /) -> int:
            return super().write(memoryview(data)[:1_000])

    target = Drip()
    cobblestone.encrypt(Drip(plain(50_000)), target, KEY, CONTEXT)
    again = Drip()
    cobblestone.decrypt(Drip(target.getvalue()), again, KEY, CONTEXT)
    assert again.getvalue() == plain(50_000)


def test_a_source_that_is_not_ready_is_no_end() -> None:
    class NotReady(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(size) or None  # type: ignore[return-value]

    target = io.BytesIO()
    with pytest.raises(TypeError):
        cobblestone.encrypt(NotReady(b"text"), target, KEY, CONTEXT)
    with pytest.raises(NotAuthentic):
        streamed(target.getvalue())


def test_no_two_ciphertexts_are_alike() -> None:
    assert sealed(b"text") != sealed(b"text")
    with pytest.raises(ValueError):
        sealed(b"text", KEY[:-1])
