"""What the gateway and its children say to each other: dataclasses as length-prefixed msgpack.

Frame: `HEAD` (version byte, envelope length, payload length), envelope, payload. The envelope is the msgpack
array `[name, fields, lengths]`; every `bytes` field stands in it as its length only, and the bytes themselves
follow as the payload, in order: pixels are neither copied into a buffer nor out of one.

A `Vocabulary` is a closed table of message types. Each field's annotation says what may stand there: `str`,
`int`, `float`, `bool`, `bytes`, a `StrEnum`, `tuple[T, ...]`, `dict[str, float]`, another dataclass, or `T | None`.
Anything else that arrives (another type, name, version, number of fields, length) is a `WireError`,
and no frame makes the reader hold more than its `Limits`. A process speaks one vocabulary only:

    CLEANING = Vocabulary(*COMMON, CleanRequest, CleanReply, Rejected)

A message with a field `id: int` is a request, the answer to the request of that id, or takes it back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import msgpack

from models import ModelCard
from service.processes.sandbox import Measure

VERSION = 1
HEAD = struct.Struct("!BII")
"""Version; envelope bytes; payload bytes."""

MAX_ARRAY = 65_536
MAX_MAP = 1_024
SEND_BUFFERS = 512
"""Buffers per `sendmsg`; the kernel takes 1024 (IOV_MAX)."""


class WireError(Exception):
    """The other side sent something that is no message, or a message cannot be sent."""


class FrameTooLarge(WireError):
    """The message is larger than a frame may be."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one frame may hold, in bytes: in its envelope, and in envelope and payload together."""

    envelope_bytes: int = 96 * 1024 * 1024
    frame_bytes: int = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Detector:
    """One detector of a screening child: whether it can be asked, and under which licence it stands."""

    name: str
    active: bool
    version: str = ""
    """Changes with every change of its answers: a digest of its weights, or a number of ours."""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class Hello:
    """A child's first message: it is ready. A worker has scored its warm-up and says what model it holds."""

    pid: int
    card: ModelCard | None = None
    sandbox: tuple[Measure, ...] = ()
    stages_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    detectors: tuple[Detector, ...] = ()
    """What a screening child looks with."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The child lives. Sent every second, also while it computes."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The request could not be answered. `detail` never repeats what was sent."""

    id: int
    code: str
    detail: str = ""


COMMON: tuple[type, ...] = (Hello, Beat, Failure)
"""What every child may say."""

Blobs = Iterator[bytes]
_Pack = Callable[[typing.Any, list[bytes]], object]
_Unpack = Callable[[object, Blobs], typing.Any]


class Vocabulary:
    """A closed table of message types, and how they travel. Immutable; serves any number of sockets."""

    def __init__(self, *messages: type, limits: Limits | None = None) -> None:
        """`limits` bind frames in both directions. Raises TypeError for a field that cannot travel."""
        self.limits = limits or Limits()
        self._codecs = {message.__name__: _Codec(message) for message in messages}
        if len(self._codecs) != len(messages):
            raise TypeError("two messages have the same name")

    def with_limits(self, limits: Limits) -> Vocabulary:
        """The same messages under other limits."""
        return Vocabulary(*(codec.type for codec in self._codecs.values()), limits=limits)

    def encode(self, message: object) -> list[bytes]:
        """One frame as buffers, to be sent in order; the message's own bytes are among them, uncopied."""
        codec = self._codecs.get(type(message).__name__)
        if codec is None or codec.type is not type(message):
            raise WireError(f"{type(message).__name__} is not in this vocabulary")
        blobs: list[bytes] = []
        try:
            fields = codec.pack(message, blobs)
            envelope = msgpack.packb([type(message).__name__, fields, [len(blob) for blob in blobs]])
        except (TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise WireError(f"{type(message).__name__} holds a value that cannot travel") from exc
        payload_bytes = sum(map(len, blobs))
        if (
            len(envelope) > self.limits.envelope_bytes
            or len(envelope) + payload_bytes > self.limits.frame_bytes
        ):
            raise FrameTooLarge(f"{len(envelope) + payload_bytes} bytes are more than a frame may hold")
        return [HEAD.pack(VERSION, len(envelope), payload_bytes) + envelope, *blobs]

    def decode(self, frame: bytes) -> typing.Any:
        """The message of one whole frame."""
        envelope_bytes, payload_bytes = self._open(frame[: HEAD.size])
        if len(frame) != HEAD.size + envelope_bytes + payload_bytes:
            raise WireError("truncated frame, or more than one")
        end = HEAD.size + envelope_bytes
        name, fields, lengths = self._envelope(frame[HEAD.size : end], payload_bytes)
        blobs = []
        for length in lengths:
            blobs.append(frame[end : end + length])
            end += length
        return self._message(name, fields, blobs)

    def send(self, connection: socket.socket, message: object) -> None:
        """Send one message on a blocking socket. Raises OSError where the other side is gone."""
        buffers: list[bytes | memoryview] = [*self.encode(message)]
        while buffers:
            sent = connection.sendmsg(buffers[:SEND_BUFFERS])
            done = 0
            while done < len(buffers) and sent >= len(buffers[done]):
                sent -= len(buffers[done])
                done += 1
            del buffers[:done]
            if sent:
                buffers[0] = memoryview(buffers[0])[sent:]

    def receive(self, connection: socket.socket) -> typing.Any:
        """The next message on a blocking socket; None where the other side closed it between two frames."""
        head = _receive_exactly(connection, HEAD.size, may_end=True)
        if not head:
            return None
        envelope_bytes, payload_bytes = self._open(head)
        envelope = _receive_exactly(connection, envelope_bytes)
        name, fields, lengths = self._envelope(envelope, payload_bytes)
        return self._message(name, fields, [_receive_exactly(connection, length) for length in lengths])

    def write(self, writer: asyncio.StreamWriter, message: object) -> None:
        """Queue one message on a stream; await `writer.drain()` after it.

        uvloop keeps the buffers as they are: 450 MB of pixels take the loop 2 ms. asyncio's own loop copies them.
        """
        for buffer in self.encode(message):
            writer.write(buffer)

    async def read(self, reader: asyncio.StreamReader) -> typing.Any:
        """The next message on a stream, or None where the other side closed it between two frames."""
        try:
            head = await reader.readexactly(HEAD.size)
        except asyncio.IncompleteReadError as exc:
            if exc.partial:
                raise WireError("truncated frame") from exc
            return None
        try:
            envelope_bytes, payload_bytes = self._open(head)
            envelope = await reader.readexactly(envelope_bytes)
            name, fields, lengths = self._envelope(envelope, payload_bytes)
            blobs = [await reader.readexactly(length) for length in lengths]
        except asyncio.IncompleteReadError as exc:
            raise WireError("truncated frame") from exc
        return self._message(name, fields, blobs)

    def _open(self, head: bytes) -> tuple[int, int]:
        """Envelope and payload length, within the limits, before a byte of either is read."""
        if len(head) != HEAD.size:
            raise WireError("truncated frame")
        version, envelope_bytes, payload_bytes = HEAD.unpack(head)
        if version != VERSION:
            raise WireError(f"version {version}, not {VERSION}")
        if (
            envelope_bytes > self.limits.envelope_bytes
            or envelope_bytes + payload_bytes > self.limits.frame_bytes
        ):
            raise FrameTooLarge(f"a frame of {envelope_bytes} and {payload_bytes} bytes")
        return envelope_bytes, payload_bytes

    def _envelope(self, envelope: bytes, payload_bytes: int) -> tuple[str, object, list[int]]:
        try:
            # Bytes never stand in an envelope. An array's length is believed before its elements are seen, on
            # each of msgpack's 1024 levels: the worst frame makes it allocate 80 MB for a moment.
            longest = min(MAX_ARRAY, len(envelope))
            whole = msgpack.unpackb(
                envelope, max_array_len=longest, max_map_len=MAX_MAP, max_bin_len=0, max_ext_len=0
            )
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as exc:
            raise WireError("not msgpack") from exc
        if type(whole) is not list or len(whole) != 3:
            raise WireError("not an envelope")
        name, fields, lengths = whole
        if type(name) is not str or name not in self._codecs:
            raise WireError("unknown message type")
        if type(lengths) is not list or not all(type(length) is int and length >= 0 for length in lengths):
            raise WireError("not a list of lengths")
        if sum(lengths) != payload_bytes:
            raise WireError("the lengths do not add up to the payload")
        return name, fields, lengths

    def _message(self, name: str, fields: object, blobs: list[bytes]) -> typing.Any:
        left = iter(blobs)
        message = self._codecs[name].unpack(fields, left)
        if next(left, None) is not None:
            raise WireError("bytes that belong to no field")
        return message


class _Codec:
    """One dataclass as a msgpack array of its fields, in order."""

    def __init__(self, kind: type) -> None:
        if not dataclasses.is_dataclass(kind):
            raise TypeError(f"{kind.__name__} is not a dataclass")
        hints = typing.get_type_hints(kind)
        self.type = kind
        self.names = tuple(field.name for field in dataclasses.fields(kind))
        self.codecs = tuple(_codec(hints[name]) for name in self.names)

    def pack(self, value: typing.Any, blobs: list[bytes]) -> object:
        if type(value) is not self.type:
            raise TypeError(f"{type(value).__name__} is not {self.type.__name__}")
        return [
            pack(getattr(value, name), blobs) for name, (pack, _) in zip(self.names, self.codecs, strict=True)
        ]

    def unpack(self, value: object, blobs: Blobs) -> typing.Any:
        if type(value) is not list or len(value) != len(self.codecs):
            raise WireError(f"not the fields of {self.type.__name__}")
        fields = [unpack(field, blobs) for field, (_, unpack) in zip(value, self.codecs, strict=True)]
        try:
            return self.type(*fields)
        except ValueError as exc:
            raise WireError(f"not a valid {self.type.__name__}") from exc


def _codec(hint: typing.Any) -> tuple[_Pack, _Unpack]:
    """How a field of this annotation is packed and unpacked."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (str, int, bool):
        return _pack_scalar(hint), _unpack_scalar(hint)
    if hint is float:
        return (lambda value, blobs: float(value)), _unpack_scalar(float)
    if hint is bytes:
        return _pack_bytes, _unpack_bytes
    if origin in (types.UnionType, typing.Union) and len(arguments) == 2 and arguments[1] is type(None):
        pack, unpack = _codec(arguments[0])
        return (
            lambda value, blobs: None if value is None else pack(value, blobs),
            lambda value, blobs: None if value is None else unpack(value, blobs),
        )
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _tuple_codec(*_codec(arguments[0]))
    if origin is dict and arguments == (str, float):
        return (lambda value, blobs: {str(k): float(v) for k, v in value.items()}), _unpack_numbers
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum_codec(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        codec = _Codec(hint)
        return codec.pack, codec.unpack
    raise TypeError(f"{hint} cannot travel")


def _pack_scalar(kind: type) -> _Pack:
    def pack(value: typing.Any, blobs: list[bytes]) -> object:
        if type(value) is not kind:
            raise TypeError(f"{type(value).__name__} is not {kind.__name__}")
        return value

    return pack


def _unpack_scalar(kind: type) -> _Unpack:
    def unpack(value: object, blobs: Blobs) -> object:
        if type(value) is not kind:  # exact: True is not an int
            raise WireError(f"{type(value).__name__} where {kind.__name__} is due")
        return value

    return unpack


def _enum_codec(kind: type[StrEnum]) -> tuple[_Pack, _Unpack]:
    members = {str(member): member for member in kind}

    def unpack(value: object, blobs: Blobs) -> StrEnum:
        member = members.get(value) if type(value) is str else None
        if member is None:
            raise WireError(f"no {kind.__name__}")
        return member

    def pack(value: typing.Any, blobs: list[bytes]) -> object:
        if type(value) is not kind:
            raise TypeError(f"{type(value).__name__} is not {kind.__name__}")
        return str(value)

    return pack, unpack


def _pack_bytes(value: typing.Any, blobs: list[bytes]) -> object:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} is not bytes")
    blobs.append(value)
    return len(value)


def _unpack_bytes(value: object, blobs: Blobs) -> bytes:
    blob = next(blobs, None)
    if blob is None or type(value) is not int or value != len(blob):
        raise WireError("bytes of another length")
    return blob


def _tuple_codec(pack: _Pack, unpack: _Unpack) -> tuple[_Pack, _Unpack]:
    def pack_all(value: typing.Any, blobs: list[bytes]) -> object:
        if len(value) > MAX_ARRAY:
            raise ValueError(f"{len(value)} elements")
        return [pack(element, blobs) for element in value]

    def unpack_all(value: object, blobs: Blobs) -> tuple[typing.Any, ...]:
        if type(value) is not list:
            raise WireError(f"{type(value).__name__} where a tuple is due")
        return tuple(unpack(element, blobs) for element in value)

    return pack_all, unpack_all


def _unpack_numbers(value: object, blobs: Blobs) -> dict[str, float]:
    if type(value) is not dict or not all(type(k) is str and type(v) is float for k, v in value.items()):
        raise WireError("not a dict of numbers")
    return value


def _receive_exactly(connection: socket.socket, size: int, *, may_end: bool = False) -> bytes:
    """`size` bytes, in one piece where the kernel gives them so; b"" at an end that is allowed."""
    if size == 0:
        return b""
    first = connection.recv(size, socket.MSG_WAITALL)
    if len(first) == size or (may_end and not first):
        return first
    pieces = [first]
    left = size - len(first)
    while left and pieces[-1]:
        pieces.append(connection.recv(left, socket.MSG_WAITALL))
        left -= len(pieces[-1])
    if left:
        raise WireError("truncated frame")
    return b"".join(pieces)
