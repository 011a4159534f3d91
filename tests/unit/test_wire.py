"""The wire between the gateway and its children: everything comes back as it was, and nothing else gets in."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import socket
import threading
import tracemalloc
from dataclasses import dataclass
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Item, Job, ModelCard, Pixels, Scores, Work
from service.fleet.messages import (
    SCORING,
    Assign,
    Cancel,
    EndSession,
    Forget,
    ScoreReply,
    ScoreRequest,
    TooLong,
)
from service.processes.sandbox import Measure
from service.processes.wire import (
    COMMON,
    HEAD,
    VERSION,
    Beat,
    Failure,
    FrameTooLarge,
    Hello,
    Limits,
    Vocabulary,
    WireError,
)
from tenants.risk import Action

MESSAGES = (Hello, Beat, Failure, Assign, ScoreRequest, Cancel, EndSession, Forget, ScoreReply, TooLong)
SMALL = SCORING.with_limits(Limits(envelope_bytes=4096, frame_bytes=16_384))

ints = st.integers(min_value=0, max_value=2**63 - 1)
texts = st.text(max_size=50)
floats = st.floats(allow_nan=False)
pixels = st.builds(
    lambda width, height, byte: Pixels(width, height, bytes([byte]) * (width * height * 3)),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 255),
)
items = st.one_of(
    st.builds(Item, text=texts, image=st.none() | pixels), st.builds(Item, text=st.none(), image=pixels)
)
jobs = st.builds(
    *(Job, items, st.lists(items, max_size=5).map(tuple)), st.none() | texts, st.none() | ints, st.booleans()
)
numbers = st.dictionaries(texts, floats, max_size=4)
scores = st.builds(
    Scores,
    st.lists(floats, max_size=9).map(tuple),
    ints,
    ints,
    ints,
    st.lists(ints, max_size=3).map(tuple),
    ints,
    numbers,
)
cards = st.builds(ModelCard, texts, texts, ints, texts, texts, texts, ints)
measures = st.builds(Measure, texts, st.booleans(), texts)
messages = st.one_of(
    st.builds(Hello, ints, st.none() | cards, st.lists(measures, max_size=3).map(tuple), numbers),
    st.just(Beat()),
    st.builds(Failure, ints, texts, texts),
    st.builds(Assign, st.none() | texts, st.none() | texts),
    st.builds(ScoreRequest, ints, texts, jobs, floats, st.none() | texts, st.none() | texts),
    st.builds(Cancel, ints),
    st.builds(EndSession, texts, texts),
    st.builds(Forget, texts),
    st.builds(ScoreReply, ints, scores, floats, ints, st.builds(Work, ints, ints, ints)),
    st.builds(TooLong, ints, ints, ints),
)


def frame(message: object, vocabulary: Vocabulary = SCORING) -> bytes:
    return b"".join(vocabulary.encode(message))


def forged(whole: Any, payload: bytes = b"", *, version: int = VERSION) -> bytes:
    """A frame around any envelope."""
    envelope = msgpack.packb(whole)
    return HEAD.pack(version, len(envelope), len(payload)) + bytes(envelope) + payload


@given(messages)
def test_every_message_comes_back_as_it_was(message: object) -> None:
    assert SCORING.decode(frame(message)) == message


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_random_bytes_are_refused_in_one_way_only(noise: bytes) -> None:
    for garbled in (noise, HEAD.pack(VERSION, len(noise), 0) + noise):
        try:
            SCORING.decode(garbled)
        except WireError:
            continue


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | texts
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=20,
)


@given(
    st.sampled_from([message.__name__ for message in MESSAGES]),
    values,
    values,
)
@settings(max_examples=200)
def test_well_formed_nonsense_is_refused_or_is_a_message(name: str, fields: Any, lengths: Any) -> None:
    no_lengths: list[int] = []
    for sizes in (lengths, no_lengths):
        try:
            message = SCORING.decode(forged([name, fields, sizes]))
        except WireError:
            continue
        decoded = SCORING.decode(frame(message))
        assert decoded == message or "nan" in repr(message)


@given(messages, st.data())
@settings(max_examples=150)
def test_a_frame_with_one_byte_changed_is_refused_or_is_a_message(
    message: object, data: st.DataObject
) -> None:
    whole = bytearray(frame(message))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        changed = SCORING.decode(bytes(whole))
    except WireError:
        return
    assert type(changed) in MESSAGES


@given(messages, st.data())
def test_a_frame_cut_anywhere_is_refused(message: object, data: st.DataObject) -> None:
    whole = frame(message)
    with pytest.raises(WireError):
        SCORING.decode(whole[: data.draw(st.integers(0, len(whole) - 1))])


@pytest.mark.parametrize(
    "whole",
    [
        ["Failure", [1, "code", "detail"], []],
        ["ScoreReply", [1, [[1.0], 1, 1, 1, [], 0, {"a": 1.0}], 1.0, 0, [0] * 9], []],
        ["ScoreRequest", [1, "t", [["q", None], [["c", None]], None, None, True], 1.0, None, None], []],
    ],
)
def test_what_the_next_test_changes_is_a_message(whole: Any) -> None:
    assert type(SCORING.decode(forged(whole))).__name__ == whole[0]


@pytest.mark.parametrize(
    "whole",
    [
        ["Failure", [1, "code"], []],  # a field too few
        ["Failure", [1, "code", "detail", 0], []],  # one too many
        ["Failure", ["1", "code", "detail"], []],
        ["Failure", [True, "code", "detail"], []],  # a bool is no int
        ["Failure", [1.0, "code", "detail"], []],
        ["Failure", [1, None, "detail"], []],
        ["Failure", {"id": 1, "code": "code", "detail": ""}, []],
        ["Failure", [1, "code", "detail"]],
        ["Failure", [1, "code", "detail"], [], 0],
        ["Failure", [1, "code", "detail"], [0]],  # bytes that belong to no field
        ["Failure", [1, "code", "detail"], [-1, 1]],
        ["Failure", [1, "code", "detail"], [True]],
        ["Failure", [1, b"code", "detail"], []],
        ["Scores", [[], 1, 1, 1, [], 0, {}], []],  # travels inside a message, and is none itself
        ["Exit", [], []],
        [["Beat"], [], []],
        ["ScoreReply", [1, [[1], 1, 1, 1, [], 0, {}], 1.0, 0, [0] * 9], []],  # an int is no float
        ["ScoreReply", [1, [[1.0], 1, 1, 1, [], 0, {"a": 1}], 1.0, 0, [0] * 9], []],
        ["ScoreReply", [1, [[1.0], 1, 1, 1, [], 0, {1: 1.0}], 1.0, 0, [0] * 9], []],
        ["ScoreReply", [1, [1.0, 1, 1, 1, [], 0, {}], 1.0, 0, [0] * 9], []],
        ["ScoreReply", [1, [[1.0], 1, 1, 1, [], 0, {}], 1.0, 0, [0] * 8], []],
        ["ScoreReply", [1, [[1.0], 1, 1, 1, [], 0, {}], 1.0, 0, [0.0] * 9], []],
        [
            "ScoreRequest",
            [1, "t", [["q", None], [[None, None]], None, None, True], 1.0, None, None],
            [],
        ],  # an empty item
        [
            "ScoreRequest",
            [1, "t", [["q", [1, 1, 3]], [], None, None, True], 1.0, None, None],
            [],
        ],  # bytes that did not come
        None,
        "Beat",
        [],
        {},
    ],
)
def test_what_is_not_exactly_a_message_is_refused(whole: Any) -> None:
    with pytest.raises(WireError):
        SCORING.decode(forged(whole))


def test_pixels_of_another_size_than_they_say_are_refused() -> None:
    def request(width: int, length: int, payload: bytes) -> bytes:
        return forged(
            [
                "ScoreRequest",
                [1, "t", [["q", [width, 1, length]], [], None, None, True], 1.0, None, None],
                [len(payload)],
            ],
            payload,
        )

    assert SCORING.decode(request(2, 6, b"123456")).job.query.image.data == b"123456"
    for wrong in (
        request(2, 5, b"123456"),
        request(3, 6, b"123456"),
        request(2, 6, b"12345"),
        request(0, 0, b""),
    ):
        with pytest.raises(WireError):
            SCORING.decode(wrong)


def test_another_version_is_refused() -> None:
    with pytest.raises(WireError, match="version"):
        SCORING.decode(forged(["Beat", [], []], version=VERSION + 1))


def test_a_vocabulary_is_closed() -> None:
    with pytest.raises(WireError):
        Vocabulary(*COMMON).encode(Assign("t"))
    with pytest.raises(WireError):
        Vocabulary(*COMMON).decode(frame(Assign("t")))

    @dataclass(frozen=True, slots=True)
    class Assign2:
        tenant: str

    Assign2.__name__ = "Assign"
    with pytest.raises(WireError):
        SCORING.encode(Assign2("t"))


def test_what_cannot_travel_is_refused_before_anything_is_sent() -> None:
    for message in (
        Assign("\ud800"),
        Assign(7),  # type: ignore[arg-type]
        Failure(2**70, "code"),
        Failure(True, "code"),
        ScoreReply(1, Scores((1.0,), 1, 1, 1, stages_ms={"a": "b"}), 1.0),  # type: ignore[dict-item]
        ScoreRequest(1, "t", "job", 1.0),  # type: ignore[arg-type]
        ScoreRequest(1, "t", Job(Item("q"), ("text",)), 1.0),  # type: ignore[arg-type]
        object(),
    ):
        with pytest.raises(WireError):
            SCORING.encode(message)
    for hint in (object, list[int], dict[str, str], int | str, tuple[int, str], Any):
        kind = dataclasses.make_dataclass("Kind", [("field", hint)])
        with pytest.raises(TypeError):
            Vocabulary(kind)


def test_of_an_enum_only_its_members_travel() -> None:
    kind = dataclasses.make_dataclass("Kind", [("field", Action)])
    vocabulary = Vocabulary(kind)
    (frame,) = vocabulary.encode(kind(Action.MASK))
    assert vocabulary.decode(frame).field is Action.MASK
    with pytest.raises(WireError):
        vocabulary.encode(kind("mask"))
    with pytest.raises(WireError):
        vocabulary.decode(frame.replace(b"mask", b"mash"))


def test_numbers_that_are_not_finite_travel_as_they_are() -> None:
    back = SCORING.decode(frame(ScoreReply(1, Scores((math.nan, math.inf), 1, 1, 1), 0.0)))
    assert math.isnan(back.scores.margins[0]) and back.scores.margins[1] == math.inf


def test_a_frame_over_the_limits_is_neither_sent_nor_read() -> None:
    with pytest.raises(FrameTooLarge):
        SMALL.encode(Assign("x" * 5000))
    image = Pixels(100, 100, bytes(30_000))
    with pytest.raises(FrameTooLarge):
        SMALL.encode(ScoreRequest(1, "t", Job(Item("q", image), ()), 1.0))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(HEAD.pack(VERSION, 2**32 - 1, 2**32 - 1))
        with pytest.raises(FrameTooLarge):
            SMALL.receive(theirs)


@pytest.mark.parametrize(
    "envelope",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32 - 1
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xdd\x00\x01\x00\x00" * 10_000,  # arrays in arrays, each of 65536
        b"\x91" * 60_000,
        b"\x81" * 60_000,
    ],
)
def test_what_a_frame_claims_is_not_allocated(envelope: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            SCORING.decode(HEAD.pack(VERSION, len(envelope), 0) + envelope)
        assert tracemalloc.get_traced_memory()[1] < 100 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_pixels_are_sent_without_a_copy() -> None:
    data = bytes(30_000)
    buffers = SCORING.encode(ScoreRequest(1, "t", Job(Item("q", Pixels(100, 100, data)), ()), 1.0))
    assert buffers[1] is data
    assert len(buffers[0]) < 100


@pytest.mark.parametrize("images", [0, 1, 700])
def test_messages_larger_than_the_socket_s_buffer_cross_between_two_blocking_sides(images: int) -> None:
    image = Pixels(50, 20, b"abc" * 1000)
    message = ScoreRequest(1, "t", Job(Item("q" * 300_000), (Item("c", image),) * images), 1.0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=SCORING.send, args=(ours, message))
        sender.start()
        assert SCORING.receive(theirs) == message
        sender.join()
        ours.close()
        assert SCORING.receive(theirs) is None


def test_half_a_frame_is_no_clean_end() -> None:
    whole = frame(Failure(1, "code", "detail"))
    for size in (1, HEAD.size, len(whole) - 1):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(whole[:size])
            ours.close()
            with pytest.raises(WireError):
                SCORING.receive(theirs)


async def test_streams_speak_the_same() -> None:
    message = ScoreRequest(1, "t", Job(Item("q"), (Item("c", Pixels(500, 500, bytes(750_000))),) * 3), 1.0)
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    with theirs:
        echo = asyncio.to_thread(lambda: SCORING.send(theirs, SCORING.receive(theirs)))
        task = asyncio.create_task(echo)
        SCORING.write(writer, message)
        await writer.drain()
        assert await SCORING.read(reader) == message
        await task
        whole = frame(Beat())
        theirs.sendall(whole + whole[:-1])
        theirs.shutdown(socket.SHUT_WR)
        assert await SCORING.read(reader) == Beat()
        with pytest.raises(WireError):
            await SCORING.read(reader)
    writer.close()
    await writer.wait_closed()


async def test_a_stream_that_ends_between_two_frames_ends_cleanly() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(frame(Beat()))
    reader.feed_eof()
    assert await SCORING.read(reader) == Beat()
    assert await SCORING.read(reader) is None
