"""The one thing that is wanted from EXIF: which way up."""

from __future__ import annotations

import struct

ORIENTATION_TAG = 0x0112
MAX_ENTRIES = 1024
"""Entries of IFD0 that are looked at; cameras write some twenty."""

_READERS = {1: "B", 3: "H", 4: "I"}
"""TIFF types that an orientation may have: BYTE, SHORT, LONG."""


def read_orientation(tiff: bytes) -> int:
    """EXIF's orientation, 1 to 8, from a TIFF block; 1 where there is none or the block makes no sense.

    EXIF only: an orientation in XMP or in a text chunk is ignored, as browsers do. Never raises.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for index in range(min(entries, MAX_ENTRIES)):
            offset = start + 2 + 12 * index
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, offset)
            if tag == ORIENTATION_TAG:
                if kind not in _READERS or count != 1:
                    return 1
                (value,) = struct.unpack_from(order + _READERS[kind], tiff, offset + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
