"""Walk a WebP's RIFF chunks (RFC 9649)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from service.errors import ImageRejected
from service.screening import ImageLimits, Structure, check_frames, check_size, reject
from service.screening.exif import read_orientation

MAX_CHUNKS = 16_384

ALPHA_FLAG, ANIMATION_FLAG = 0x10, 0x02
"""Of VP8X's flags the two that concern pixels; those for EXIF, XMP and ICC go with what they announce."""

_KINDS = {b"EXIF": "exif", b"XMP ": "xmp", b"ICCP": "icc", b"C2PA": "c2pa"}


@dataclass(slots=True)
class _Walk:
    """What has been seen so far."""

    canvas: tuple[int, int] | None = None
    flags: int = 0
    picture: tuple[int, int] | None = None
    alpha: bool = False
    frames: int = 0
    kept: list[bytes] = field(default_factory=list)
    metadata: set[str] = field(default_factory=set)
    orientation: int = 1


def walk_webp(data: bytes, limits: ImageLimits) -> Structure:
    """Structure of a WebP. Raises `ImageRejected` where it is cut, inconsistent, or beyond the limits."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise _cut()
    view = memoryview(data)[:end]
    seen = _Walk()
    position = 12
    for _ in range(MAX_CHUNKS):
        if position >= end:
            return _finish(data, end, seen, limits)
        kind, body, position = _next_chunk(view, position)
        _take(seen, kind, body, limits)
    raise reject("too_complex", f"The WebP has more than {MAX_CHUNKS} chunks; save it again.", MAX_CHUNKS)


def _next_chunk(view: memoryview, position: int) -> tuple[bytes, memoryview, int]:
    """The chunk at `position`, its body, and where the next begins."""
    if len(view) < position + 8:
        raise _damaged("bytes where a chunk should be")
    kind, length = struct.unpack_from("<4sI", view, position)
    end = position + 8 + length
    if end > len(view):
        raise _damaged("a chunk beyond its end")
    return kind, view[position + 8 : end], end + (length & 1)  # the last padding byte may be missing


def _take(seen: _Walk, kind: bytes, body: memoryview, limits: ImageLimits) -> None:
    if kind == b"VP8X":
        if seen.canvas or seen.picture or len(body) < 10:
            raise _damaged("a VP8X out of place")
        seen.flags = body[0]
        seen.canvas = (_u24(body, 4) + 1, _u24(body, 7) + 1)
        check_size(*seen.canvas, limits)
        kept_flags = bytes([body[0] & (ALPHA_FLAG | ANIMATION_FLAG)])
        seen.kept.append(_chunk(b"VP8X", kept_flags + bytes(3) + bytes(body[4:10])))
    elif kind in (b"VP8 ", b"VP8L"):
        if seen.picture or seen.frames:
            raise _damaged("more than one picture outside an animation")
        seen.picture, has_alpha = _read_bitstream(kind, body)
        seen.alpha |= has_alpha
        check_size(*seen.picture, limits)
        if seen.canvas not in (None, seen.picture):
            raise _damaged("a picture of another size than its canvas")
        seen.kept.append(_chunk(kind, body))
    elif kind == b"ALPH" and seen.canvas and not seen.picture and not seen.alpha:
        seen.alpha = True
        seen.kept.append(_chunk(kind, body))
    elif kind == b"ANIM" and seen.canvas and len(body) == 6 and not seen.frames:
        seen.kept.append(_chunk(kind, body))
    elif kind == b"ANMF" and seen.canvas and not seen.picture:
        seen.frames += 1
        if seen.frames == 1:  # the first frame is all that is ever decoded
            seen.alpha |= _check_frame(body, seen.canvas)
            seen.kept.append(_chunk(kind, body))
    elif kind in (b"ALPH", b"ANIM", b"ANMF"):
        raise _damaged(f"a chunk {kind.decode('ascii')} out of place")
    else:
        if kind == b"EXIF" and "exif" not in seen.metadata:
            # Some writers put JPEG's prefix before the TIFF block.
            seen.orientation = read_orientation(bytes(body).removeprefix(b"Exif\0\0"))
        seen.metadata.add(_KINDS.get(kind, "unknown"))


def _read_bitstream(kind: bytes, body: memoryview) -> tuple[tuple[int, int], bool]:
    """Width and height of a VP8 (RFC 6386, 9.1) or VP8L key frame, and whether it may be transparent."""
    if kind == b"VP8L":
        if len(body) < 5 or body[0] != 0x2F or body[4] >> 5:
            raise _damaged("a broken VP8L header")
        bits = int.from_bytes(body[1:5], "little")
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), bool(bits >> 28 & 1)
    if len(body) < 10 or bytes(body[3:6]) != b"\x9d\x01\x2a" or body[0] & 1:
        raise _damaged("a broken VP8 header")
    if _u24(body, 0) >> 5 > len(body) - 10:  # the first partition's size
        raise _damaged("fewer data than its header says")
    width, height = struct.unpack_from("<HH", body, 6)
    return (width & 0x3FFF, height & 0x3FFF), False


def _check_frame(body: memoryview, canvas: tuple[int, int]) -> bool:
    """One frame of an animation lies on its canvas and is what it says; True where it may be transparent."""
    if len(body) < 24:
        raise _damaged("a frame without a picture")
    left, top, width, height = _u24(body, 0) * 2, _u24(body, 3) * 2, _u24(body, 6) + 1, _u24(body, 9) + 1
    if left + width > canvas[0] or top + height > canvas[1]:
        raise _damaged("a frame beyond its canvas")
    kind, picture, position = _next_chunk(body, 16)
    alpha = kind == b"ALPH"
    if alpha:
        kind, picture, _ = _next_chunk(body, position)
    if kind not in (b"VP8 ", b"VP8L"):
        raise _damaged("a frame without a picture")
    size, has_alpha = _read_bitstream(kind, picture)
    if size != (width, height):
        raise _damaged("a picture of another size than its frame")
    return alpha or has_alpha or (width, height) != canvas


def _finish(data: bytes, end: int, seen: _Walk, limits: ImageLimits) -> Structure:
    size = seen.canvas if seen.frames else seen.picture
    if size is None:
        raise _damaged("no picture before its end")
    check_frames(max(1, seen.frames), limits)
    if bool(seen.flags & ANIMATION_FLAG) != bool(seen.frames):
        raise _damaged("a header that contradicts its frames")
    body = b"WEBP" + b"".join(seen.kept)
    return Structure(
        format="webp",
        width=size[0],
        height=size[1],
        channels=4 if seen.alpha else 3,
        depth=8,
        frames=max(1, seen.frames),
        orientation=seen.orientation,
        end=end,
        trailing_bytes=len(data) - end,
        metadata=frozenset(seen.metadata),
        core=b"RIFF" + struct.pack("<I", len(body)) + body,
    )


def _chunk(kind: bytes, body: memoryview | bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + bytes(body) + bytes(len(body) & 1)


def _u24(body: memoryview, offset: int) -> int:
    return int.from_bytes(body[offset : offset + 3], "little")


def _cut() -> ImageRejected:
    return reject("damaged", "The WebP ends before its picture does; send the whole file.")


def _damaged(what: str) -> ImageRejected:
    return reject("damaged", f"The WebP is damaged: it has {what}.")
