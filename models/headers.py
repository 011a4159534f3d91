"""The header of a safetensors file, read strictly (github.com/huggingface/safetensors, "Format"). Free of torch.

Parsers differ in what they let pass: a name that stands twice, bytes that belong to no tensor, a program before or
behind the tensors. What passes here has one meaning.
"""

from __future__ import annotations

import json
import math
from typing import Any

HEADER_BYTES_MOST = 16 << 20
"""A model of 7B has some 100 KB."""
LENGTH_BYTES = 8

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


class HeaderInvalid(ValueError):
    """Not the header of a safetensors file with one meaning; the text says why."""


def header_size(head: bytes | bytearray) -> int:
    """How many bytes of the file come before the tensors, by its first eight. Raises `HeaderInvalid`."""
    size = int.from_bytes(head[:LENGTH_BYTES], "little")
    if len(head) < LENGTH_BYTES or size > HEADER_BYTES_MOST:
        raise HeaderInvalid("it is none, or far too long")
    return LENGTH_BYTES + size


def check_header(head: bytes | bytearray, size_bytes: int) -> None:
    """Raises `HeaderInvalid`; `head` is at least the header of a file that has `size_bytes`."""
    end = header_size(head)
    text = bytes(head[LENGTH_BYTES:end])
    if len(text) < end - LENGTH_BYTES or not text.startswith(b"{"):
        raise HeaderInvalid("it is cut short, or no JSON object")
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        _check_metadata(header.pop("__metadata__", {}))
        places = sorted(_place(name, tensor) for name, tensor in header.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise exc if isinstance(exc, HeaderInvalid) else HeaderInvalid("it cannot be read") from exc
    reached = 0
    for start, stop in places:
        if start != reached:
            raise HeaderInvalid("tensors overlap, or bytes between them belong to none")
        reached = stop
    if end + reached != size_bytes:
        raise HeaderInvalid("the tensors end elsewhere than the file")


def _place(name: str, tensor: Any) -> tuple[int, int]:
    if set(tensor) != {"dtype", "shape", "data_offsets"}:
        raise HeaderInvalid("a tensor has other fields than it should")
    start, stop = tensor["data_offsets"]
    shape = tensor["shape"]
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise HeaderInvalid("a size is none")
    if (stop - start) * 8 != math.prod(shape) * _BITS[tensor["dtype"]]:
        raise HeaderInvalid("a tensor has another size than its shape")
    return start, stop


def _check_metadata(metadata: Any) -> None:
    if not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderInvalid("its metadata is no text")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise HeaderInvalid("a name stands twice")
    return found
