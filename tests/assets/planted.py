"""Files that carry metadata of every kind, written here byte by byte, each kind with a canary of its own.

They follow the formats' own rules (EXIF 2.32 with GPS and a thumbnail in IFD1, XMP, IPTC-IIM, ICC v2, JFXX, MPF,
JUMBF as C2PA has it), so that a reader of metadata finds what was planted: where it does not, neither does the test.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from tests.assets.images import (
    draw_webp,
    encode,
    jpeg_segment,
    photo,
    png_chunk,
    riff_chunk,
    with_chunks,
    with_segments,
)

SIZE = (64, 40)
C2PA_UUID = bytes.fromhex("6332706100110010800000aa00389b71")
JSON_UUID = bytes.fromhex("6a736f6e00110010800000aa00389b71")


def canary(kind: str) -> bytes:
    return f"canary-{kind}-7f3a91".encode()


@dataclass(frozen=True, slots=True)
class Planted:
    """One file, and the kinds of canaries in it."""

    form: str
    data: bytes
    kinds: tuple[str, ...]
    packed: frozenset[str] = frozenset()
    """Kinds that stand in it compressed: no search of its bytes finds them."""


Entry = tuple[int, int, int, bytes]


def ifd(entries: list[Entry], offset: int, following: int = 0) -> bytes:
    """One little-endian image file directory that begins at `offset`, with what does not fit into its entries."""
    head = struct.pack("<H", len(entries))
    beyond = b""
    beyond_at = offset + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        if len(value) <= 4:
            head += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
        else:
            head += struct.pack("<HHII", tag, kind, count, beyond_at + len(beyond))
            beyond += value + bytes(len(value) & 1)
    return head + struct.pack("<I", following) + beyond


def ascii_entry(tag: int, kind: str) -> Entry:
    text = canary(kind) + b"\0"
    return tag, 2, len(text), text


def exif_block(orientation: int = 1) -> bytes:
    """A TIFF block: IFD0, Exif, GPS, and IFD1 with a thumbnail that has a comment of its own."""
    degrees = struct.pack("<6I", 31, 1, 16, 1, 12, 1)
    comment = b"ASCII\0\0\0" + canary("user-comment")
    method = b"ASCII\0\0\0" + canary("gps")
    exif = [
        (0x9286, 7, len(comment), comment),
        (0x927C, 7, len(canary("maker-note")), canary("maker-note")),
        ascii_entry(0xA431, "serial"),
    ]
    gps: list[Entry] = [
        (0x0000, 1, 4, b"\2\3\0\0"),
        (0x0001, 2, 2, b"S\0"),
        (0x0002, 5, 3, degrees),
        (0x0003, 2, 2, b"E\0"),
        (0x0004, 5, 3, degrees),
        (0x001B, 7, len(method), method),
    ]
    thumbnail = with_segments(encode(photo(16, 16), "JPEG"), jpeg_segment(0xFE, canary("exif-thumbnail")))

    def first(exif_at: int, gps_at: int, next_at: int) -> bytes:
        entries = [
            ascii_entry(0x010E, "description"),
            ascii_entry(0x013B, "artist"),
            (0x0112, 3, 1, struct.pack("<H", orientation)),
            (0x8769, 4, 1, struct.pack("<I", exif_at)),
            (0x8825, 4, 1, struct.pack("<I", gps_at)),
        ]
        return ifd(entries, 8, next_at)

    exif_at = 8 + len(first(0, 0, 0))
    gps_at = exif_at + len(ifd(exif, exif_at))
    next_at = gps_at + len(ifd(gps, gps_at))

    def second(thumbnail_at: int) -> bytes:
        entries = [
            (0x0103, 3, 1, struct.pack("<H", 6)),
            (0x0201, 4, 1, struct.pack("<I", thumbnail_at)),
            (0x0202, 4, 1, struct.pack("<I", len(thumbnail))),
        ]
        return ifd(entries, next_at)

    thumbnail_at = next_at + len(second(0))
    return (
        b"II*\0\x08\0\0\0"
        + first(exif_at, gps_at, next_at)
        + ifd(exif, exif_at)
        + ifd(gps, gps_at)
        + second(thumbnail_at)
        + thumbnail
    )


EXIF_KINDS = ("description", "artist", "user-comment", "maker-note", "serial", "gps", "exif-thumbnail")


def xmp_packet() -> bytes:
    return (
        b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        b'xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/" photoshop:City="' + canary("xmp") + b'"/>'
        b'</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def iptc_block() -> bytes:
    """Photoshop's resources with one IIM dataset, 2:80 by-line."""
    line = canary("iptc")
    iim = b"\x1c\x02\x50" + struct.pack(">H", len(line)) + line
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iim)) + iim + bytes(len(iim) & 1)
    return b"Photoshop 3.0\0" + resource


def icc_profile() -> bytes:
    """A display profile of version 2.1 with a description and a copyright."""
    text = canary("icc")
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + bytes(79)
    rights = b"text\0\0\0\0" + canary("icc-copyright") + b"\0"
    description += bytes(-len(description) % 4)
    start = 128 + 4 + 2 * 12
    tags = struct.pack(">I", 2)
    tags += struct.pack(">4sII", b"desc", start, len(description))
    tags += struct.pack(">4sII", b"cprt", start + len(description), len(rights))
    size = start + len(description) + len(rights)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 2, 3, 4, 5) + b"acsp"
    return head.ljust(128, b"\0") + tags + description + rights


def jumbf(kind: str = "c2pa") -> bytes:
    """A manifest store as C2PA nests it: a superbox, its description, a JSON assertion."""

    def box(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(body), name) + body

    assertion = box(
        b"jumb",
        box(b"jumd", JSON_UUID + b"\x03stds.schema-org.CreativeWork\0")
        + box(b"json", b'{"author":"' + canary(kind) + b'"}'),
    )
    return box(b"jumb", box(b"jumd", C2PA_UUID + b"\x03c2pa\0") + assertion)


def with_comment(kind: str) -> bytes:
    return with_segments(encode(photo(16, 16), "JPEG"), jpeg_segment(0xFE, canary(kind)))


def planted_jpeg(orientation: int = 1) -> Planted:
    second = with_comment("mpf-image")
    plain = encode(photo(*SIZE), "JPEG")
    values: list[Entry] = [
        (0xB000, 7, 4, b"0100"),
        (0xB001, 4, 1, struct.pack("<I", 2)),
        # Two MP entries: attributes, size, offset, two dependents each; the second one's offset is not looked up.
        (
            0xB002,
            7,
            32,
            struct.pack("<IIIHH", 0x030000, len(plain), 0, 0, 0)
            + struct.pack("<IIIHH", 0, len(second), 9, 0, 0),
        ),
    ]
    pictures = b"MPF\0II*\0\x08\0\0\0" + ifd(values, 8)
    pixels = canary("jfif-thumbnail").ljust(30, b"-")
    jfif = b"JFIF\0\x01\x02\0\0\x01\0\x01" + bytes([10, 1]) + pixels
    data = plain[:2] + b"".join(
        [
            jpeg_segment(0xE0, jfif),
            jpeg_segment(0xE0, b"JFXX\0\x10" + with_comment("jfxx")),
            jpeg_segment(0xE1, b"Exif\0\0" + exif_block(orientation)),
            jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp_packet()),
            jpeg_segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(40) + canary("xmp-extension")),
            jpeg_segment(0xE2, b"ICC_PROFILE\0\x01\x01" + icc_profile()),
            jpeg_segment(0xE2, pictures),
            jpeg_segment(0xEB, b"JP\0\x01\0\0\0\x01" + jumbf()),
            jpeg_segment(0xEC, canary("app12")),
            jpeg_segment(0xED, iptc_block()),
            jpeg_segment(0xEF, canary("app15")),
            jpeg_segment(0xFE, canary("comment")),
        ]
    )
    data += plain[2:] + second + canary("trailing")
    kinds = (
        "jfif-thumbnail",
        "jfxx",
        "xmp",
        "xmp-extension",
        "icc",
        "icc-copyright",
        "c2pa",
        "app12",
        "iptc",
        "app15",
    )
    return Planted("jpeg", data, (*EXIF_KINDS, *kinds, "comment", "mpf-image", "trailing"))


def planted_png(orientation: int = 1) -> Planted:
    plain = encode(photo(*SIZE), "PNG")
    raw_profile = b"\niptc\n%8d\n" % len(iptc_block()) + iptc_block().hex().encode() + b"\n"
    data = with_chunks(
        plain,
        png_chunk(b"eXIf", exif_block(orientation)),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(icc_profile())),
        png_chunk(b"tEXt", b"Author\0" + canary("text")),
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(canary("ztxt"))),
        png_chunk(b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(raw_profile)),
        png_chunk(b"iTXt", b"Title\0\0\0\0\0" + canary("itxt")),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_packet()),
        png_chunk(b"caBX", jumbf()),
        png_chunk(b"prVt", canary("unknown")),
        png_chunk(b"tIME", struct.pack(">HBBBBB", 2026, 1, 2, 3, 4, 5)),
    )
    end = png_chunk(b"IEND")
    data = data[: -len(end)] + png_chunk(b"tEXt", b"Late\0" + canary("late-text")) + end + canary("trailing")
    kinds = (
        "icc",
        "icc-copyright",
        "text",
        "ztxt",
        "iptc",
        "itxt",
        "xmp",
        "c2pa",
        "unknown",
        "late-text",
        "trailing",
    )
    return Planted("png", data, (*EXIF_KINDS, *kinds), frozenset({"icc", "icc-copyright", "ztxt", "iptc"}))


def planted_webp(orientation: int = 1) -> Planted:
    plain = encode(photo(*SIZE), "WEBP")
    canvas = (SIZE[0] - 1).to_bytes(3, "little") + (SIZE[1] - 1).to_bytes(3, "little")
    data = draw_webp(
        riff_chunk(b"VP8X", bytes([0x2C, 0, 0, 0]) + canvas),
        riff_chunk(b"ICCP", icc_profile()),
        plain[12:],
        riff_chunk(b"EXIF", exif_block(orientation)),
        riff_chunk(b"XMP ", xmp_packet()),
        riff_chunk(b"C2PA", jumbf()),
        riff_chunk(b"UNKN", canary("unknown")),
    )
    data += canary("trailing")
    return Planted("webp", data, (*EXIF_KINDS, "icc", "icc-copyright", "xmp", "c2pa", "unknown", "trailing"))
