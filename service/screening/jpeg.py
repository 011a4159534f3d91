"""Walk a JPEG's markers from SOI to EOI (ITU-T T.81, annex B).

Only what libjpeg decodes everywhere passes: 8-bit Huffman JPEG, sequential or progressive, of 1, 3 or 4
components. The walk counts scans, because each scan over a progressive image costs a pass over all of it: 78
KB with 500 scans take five seconds to decode.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import ceil

from service.errors import ImageRejected
from service.screening import ImageLimits, Structure, check_size, reject
from service.screening.exif import read_orientation

MAX_SCANS = 64
MAX_SEGMENTS = 4096
ABSENT = 16
"""Bits left of a coefficient of which no scan has brought any."""

SOI, EOI, SOS, DQT, DHT, DRI, COM = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
FRAMES_DECODED = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
FRAMES_OTHER = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCC, 0xCD, 0xCE, 0xCF, 0xDE}
"""Lossless, hierarchical, arithmetic-coded (and DAC, DHP, that announce them): legal, but read nowhere."""

# Within a scan FF 00 is a stuffed byte, FF D0..D7 a restart, FF FF a fill byte; anything else ends the scan.
# One byte of look-ahead and no repetition, so that a megabyte of FF costs one pass.
_SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_FILLING = re.compile(rb"\xff+")

_APP_KINDS: tuple[tuple[int, bytes, str], ...] = (
    (0xE0, b"JFXX", "thumbnail"),
    (0xE1, b"Exif\0", "exif"),
    (0xE1, b"http://ns.adobe.com/", "xmp"),
    (0xE2, b"ICC_PROFILE", "icc"),
    (0xE2, b"MPF", "multi-picture"),
    (0xEB, b"JP", "c2pa"),
    (0xED, b"Photoshop", "iptc"),
)


@dataclass(slots=True)
class _Walk:
    """What has been seen so far."""

    kept: list[bytes] = field(default_factory=lambda: [b"\xff\xd8"])
    metadata: set[str] = field(default_factory=set)
    frame: _Frame | None = None
    orientation: int = 1
    scans: int = 0
    scan_bytes: int = 0
    bits_left: dict[int, list[int]] = field(default_factory=dict)
    """By component id: for each of the 64 coefficients, how many low bits no scan has brought yet."""


@dataclass(frozen=True, slots=True)
class _Frame:
    progressive: bool
    width: int
    height: int
    components: tuple[tuple[int, int, int], ...]
    """(id, horizontal sampling, vertical sampling)"""

    @property
    def blocks(self) -> int:
        """8 × 8 blocks of all components."""
        widest = max(h for _, h, _ in self.components)
        tallest = max(v for _, _, v in self.components)
        return sum(
            ceil(self.width * h / widest / 8) * ceil(self.height * v / tallest / 8)
            for _, h, v in self.components
        )


def walk_jpeg(data: bytes, limits: ImageLimits) -> Structure:
    """Structure of a JPEG. Raises `ImageRejected` where it is cut, inconsistent, or beyond the limits."""
    seen = _Walk()
    position = 2
    for _ in range(MAX_SEGMENTS):
        marker, position = _next_marker(data, position)
        if marker == EOI:
            return _finish(data, position, seen)
        if len(data) < position + 2:
            raise _cut()
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2:
            raise _damaged("a segment shorter than its own header")
        end = position + length
        if end > len(data):
            raise _cut()
        body = data[position + 2 : end]
        if marker == SOS:
            scan = _SCAN_END.search(data, end)
            if scan is None:
                raise _cut()
            _begin_scan(seen, body, scan.start() - end)
            end = scan.start()
        elif marker in FRAMES_DECODED:
            if seen.frame is not None:
                raise _damaged("more than one frame header")
            seen.frame = _read_frame(body, progressive=marker == 0xC2, limits=limits)
        elif 0xE0 <= marker <= 0xEF or marker == COM:
            _take_application(seen, marker, body)
            position = end
            continue
        elif marker in FRAMES_OTHER:
            raise reject(
                "format",
                "A lossless, hierarchical or arithmetic-coded JPEG is not accepted; save it as baseline.",
            )
        elif marker not in (DQT, DHT, DRI):
            raise _damaged(f"marker {marker:02X} out of place")
        seen.kept.append(b"\xff" + bytes([marker]) + data[position:end])
        position = end
    raise reject(
        "too_complex", f"The JPEG has more than {MAX_SEGMENTS} segments; save it again.", MAX_SEGMENTS
    )


def _next_marker(data: bytes, position: int) -> tuple[int, int]:
    """The marker at `position` and where its body begins; FF may be repeated as filling."""
    if position >= len(data):
        raise _cut()
    filling = _FILLING.match(data, position)
    if filling is None:
        raise _damaged("bytes between two segments")
    if filling.end() == len(data):
        raise _cut()
    return data[filling.end()], filling.end() + 1


def _read_frame(body: bytes, *, progressive: bool, limits: ImageLimits) -> _Frame:
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise _damaged("a frame header of the wrong length")
    depth, height, width, count = (
        body[0],
        int.from_bytes(body[1:3], "big"),
        int.from_bytes(body[3:5], "big"),
        body[5],
    )
    if depth != 8 or count not in (1, 3, 4):
        raise reject(
            "format",
            f"A JPEG of {count} components of {depth} bits is not accepted; "
            "save it as 8-bit RGB or greyscale.",
        )
    check_size(width, height, limits)
    components = tuple((body[i], body[i + 1] >> 4, body[i + 1] & 15) for i in range(6, len(body), 3))
    if len({name for name, _, _ in components}) != count:
        raise _damaged("two components of one name")
    if not all(1 <= h <= 4 and 1 <= v <= 4 for _, h, v in components):
        raise _damaged("impossible sampling factors")
    return _Frame(progressive, width, height, components)


def _begin_scan(seen: _Walk, body: bytes, scan_bytes: int) -> None:
    if seen.frame is None:
        raise _damaged("a scan before its frame header")
    if not body or len(body) != 4 + 2 * body[0]:
        raise _damaged("a scan header of the wrong length")
    seen.scans += 1
    if seen.scans > MAX_SCANS:
        raise reject(
            "too_complex", f"The JPEG has more than {MAX_SCANS} scans; save it as baseline.", MAX_SCANS
        )
    names = {body[1 + 2 * i] for i in range(body[0])}
    if not names or not names <= {name for name, _, _ in seen.frame.components}:
        raise _damaged("a scan of components that the frame lacks")
    first, last, approximation = body[-3:]
    if not seen.frame.progressive:
        first, last, approximation = 0, 63, 0  # decoders ignore what stands there
    if first > last or last > 63:
        raise _damaged("a scan of coefficients that do not exist")
    for name in names:
        left = seen.bits_left.setdefault(name, [ABSENT] * 64)
        left[first : last + 1] = [approximation & 15] * (last + 1 - first)
    seen.scan_bytes += scan_bytes


def _take_application(seen: _Walk, marker: int, body: bytes) -> None:
    """Keep the two that say how colours are coded, bare; read which way up; drop the rest."""
    if marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14:
        seen.kept.append(b"\xff\xe0\0\x10" + body[:12] + b"\0\0")  # a thumbnail of 0 × 0
        if len(body) > 14:
            seen.metadata.add("thumbnail")
        return
    if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
        seen.kept.append(b"\xff\xee\0\x0e" + body[:12])
        return
    if marker == 0xE1 and body.startswith(b"Exif\0") and "exif" not in seen.metadata:
        seen.orientation = read_orientation(body[6:])
    kinds = (kind for code, magic, kind in _APP_KINDS if code == marker and body.startswith(magic))
    seen.metadata.add(next(kinds, "comment" if marker == COM else "application"))


def _finish(data: bytes, end: int, seen: _Walk) -> Structure:
    frame = seen.frame
    if frame is None or not seen.scans:
        raise _damaged("no picture before its end")
    # A progressive JPEG that was cut between two scans and closed again is whole to a decoder, only blurred.
    if any(any(seen.bits_left.get(name, [ABSENT])) for name, _, _ in frame.components):
        raise _damaged("not all of its scans")
    # A Huffman code has one bit at least: one per block for the DC, another for the end of the block unless
    # progressive. A header that promises more than the scans can hold would decode to grey, without an error.
    if seen.scan_bytes * 8 < frame.blocks * (1 if frame.progressive else 2):
        raise _damaged("fewer data than its size needs")
    seen.kept.append(b"\xff\xd9")
    return Structure(
        format="jpeg",
        width=frame.width,
        height=frame.height,
        channels=len(frame.components),
        depth=8,
        frames=1,  # a second picture after EOI (MPO, gain map) is trailing bytes
        orientation=seen.orientation,
        end=end,
        trailing_bytes=len(data) - end,
        metadata=frozenset(seen.metadata),
        core=b"".join(seen.kept),
    )


def _cut() -> ImageRejected:
    return reject("damaged", "The JPEG ends before its picture does; send the whole file.")


def _damaged(what: str) -> ImageRejected:
    return reject("damaged", f"The JPEG is damaged: it has {what}.")
