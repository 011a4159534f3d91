"""Walk a PNG's chunks from IHDR to IEND, with every CRC (PNG third edition, section 5)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

from service.errors import ImageRejected
from service.screening import ImageLimits, Structure, check_frames, check_size, reject
from service.screening.exif import read_orientation

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 16_384
"""A 16 MB file in IDATs of 1 KiB; common writers use 8 KiB and more."""

DEFLATE_RATIO = 1032
"""Most bytes that deflate can make of one: 258 from two bits."""

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
_DEPTHS = {
    GREY: (1, 2, 4, 8, 16),
    COLOUR: (8, 16),
    PALETTE: (1, 2, 4, 8),
    GREY_ALPHA: (8, 16),
    COLOUR_ALPHA: (8, 16),
}
_CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}

_KINDS = {
    b"eXIf": "exif",
    b"iCCP": "icc",
    b"tEXt": "text",
    b"zTXt": "text",
    b"iTXt": "text",
    b"tIME": "time",
    b"caBX": "c2pa",
}
_COLOUR_HINTS = {
    b"gAMA",
    b"cHRM",
    b"sRGB",
    b"sBIT",
    b"bKGD",
    b"hIST",
    b"pHYs",
    b"sPLT",
    b"cICP",
    b"mDCV",
    b"cLLI",
}
"""Say nothing of where a picture comes from: dropped without a word."""


@dataclass(frozen=True, slots=True)
class _Header:
    width: int
    height: int
    depth: int
    colour: int

    @property
    def channels(self) -> int:
        return _CHANNELS[self.colour]


@dataclass(slots=True)
class _Walk:
    """What has been seen so far."""

    kept: list[bytes]
    metadata: set[str] = field(default_factory=set)
    orientation: int = 1
    animation_frames: int = 0
    frame_before_data: bool = False
    palette_entries: int = 0
    transparency: bytes | None = None
    data_bytes: int = 0
    data_over: bool = False


def walk_png(data: bytes, limits: ImageLimits) -> Structure:
    """Structure of a PNG. Raises `ImageRejected` where it is cut, inconsistent, or beyond the limits."""
    if not data.startswith(SIGNATURE):
        raise _cut() if SIGNATURE.startswith(data) else _damaged("a broken signature")
    view = memoryview(data)
    kind, body, position = _next_chunk(view, len(SIGNATURE))
    if kind != b"IHDR":
        raise _damaged("no IHDR at its start")
    header = _read_header(body, limits)
    seen = _Walk([data[:position]])
    for _ in range(MAX_CHUNKS):
        start = position
        kind, body, position = _next_chunk(view, start)
        if kind == b"IEND":
            seen.kept.append(data[start:position])
            return _finish(data, position, header, seen, limits)
        if _take(seen, header, kind, body):
            seen.kept.append(data[start:position])
    raise reject("too_complex", f"The PNG has more than {MAX_CHUNKS} chunks; save it again.", MAX_CHUNKS)


def _next_chunk(view: memoryview, position: int) -> tuple[bytes, memoryview, int]:
    """The chunk at `position`, its body, and where the next begins; its CRC holds."""
    if len(view) < position + 12:
        raise _cut()
    length, kind = struct.unpack_from(">I4s", view, position)
    if not kind.isalpha():
        raise _damaged("bytes where a chunk should be")
    end = position + 12 + length
    if end > len(view):
        raise _cut()
    if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
        raise _damaged(f"a wrong checksum in its chunk {kind.decode('ascii')}")
    return kind, view[position + 8 : end - 4], end


def _read_header(body: memoryview, limits: ImageLimits) -> _Header:
    if len(body) != 13:
        raise _damaged("an IHDR of the wrong length")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", body)
    if depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise _damaged("an impossible IHDR")
    check_size(width, height, limits)
    return _Header(width, height, depth, colour)


def _take(seen: _Walk, header: _Header, kind: bytes, body: memoryview) -> bool:
    """Note one chunk; True where the decoder needs it."""
    if kind == b"IDAT":
        if seen.data_over:
            raise _damaged("its data in two places")
        if header.colour == PALETTE and not seen.palette_entries:
            raise _damaged("no palette before its data")
        seen.data_bytes += len(body)
        return True
    seen.data_over = seen.data_bytes > 0
    if kind == b"PLTE":
        return _take_palette(seen, header, body)
    if kind == b"tRNS":
        return _take_transparency(seen, header, body)
    if kind == b"acTL" and not seen.data_over:
        if len(body) != 8:
            raise _damaged("an acTL of the wrong length")
        # The largest of several: a viewer might believe any of them.
        seen.animation_frames = max(seen.animation_frames, int.from_bytes(body[:4], "big"))
    elif kind == b"fcTL" and not seen.data_over:
        seen.frame_before_data = True
    elif kind == b"eXIf" and "exif" not in seen.metadata:
        seen.orientation = read_orientation(bytes(body))
    elif kind[:1].isupper():
        raise _damaged(f"an unknown critical chunk {kind.decode('ascii')}")
    if kind == b"iTXt" and bytes(body[:22]) == b"XML:com.adobe.xmp\0\0\0\0\0":
        seen.metadata.add("xmp")
    elif kind not in _COLOUR_HINTS and kind not in (b"acTL", b"fcTL", b"fdAT"):
        seen.metadata.add(_KINDS.get(kind, "unknown"))
    return False


def _take_palette(seen: _Walk, header: _Header, body: memoryview) -> bool:
    entries, rest = divmod(len(body), 3)
    if rest or not 1 <= entries <= 256 or seen.palette_entries or seen.data_over:
        raise _damaged("an impossible palette")
    seen.palette_entries = entries
    return header.colour == PALETTE  # elsewhere a mere suggestion


def _take_transparency(seen: _Walk, header: _Header, body: memoryview) -> bool:
    if seen.data_over or header.colour in (GREY_ALPHA, COLOUR_ALPHA):
        return False  # void there, decoders pass over it
    expected = {GREY: 2, COLOUR: 6}
    fits = (
        len(body) == expected[header.colour]
        if header.colour in expected
        else len(body) <= seen.palette_entries
    )
    if not fits or not len(body) or seen.transparency is not None:
        raise _damaged("an impossible tRNS")
    seen.transparency = bytes(body)
    return header.colour == PALETTE


def _finish(data: bytes, end: int, header: _Header, seen: _Walk, limits: ImageLimits) -> Structure:
    # The default image counts where the animation does not begin with it.
    frames = seen.animation_frames + (seen.animation_frames > 0 and not seen.frame_before_data) or 1
    check_frames(frames, limits)
    if not seen.data_bytes:
        raise _damaged("no picture before its end")
    if header.width * header.height * header.channels * header.depth // 8 > seen.data_bytes * DEFLATE_RATIO:
        raise _damaged("fewer data than its size needs")
    return Structure(
        format="png",
        width=header.width,
        height=header.height,
        channels=header.channels,
        depth=header.depth,
        frames=frames,
        orientation=seen.orientation,
        end=end,
        trailing_bytes=len(data) - end,
        metadata=frozenset(seen.metadata),
        core=b"".join(seen.kept),
        transparent=_transparent(header, seen.transparency),
    )


def _transparent(header: _Header, transparency: bytes | None) -> tuple[int, ...] | None:
    """tRNS of a grey or colour image as sample values of its own depth; only the low bits count."""
    if transparency is None or header.colour == PALETTE:
        return None
    mask = (1 << header.depth) - 1
    return tuple(value & mask for value in struct.unpack(f">{len(transparency) // 2}H", transparency))


def _cut() -> ImageRejected:
    return reject("damaged", "The PNG ends before its picture does; send the whole file.")


def _damaged(what: str) -> ImageRejected:
    return reject("damaged", f"The PNG is damaged: it has {what}.")
