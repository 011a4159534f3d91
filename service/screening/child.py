"""The process that touches untrusted bytes: a file in, pixels out. Started by `pool.py` as `python -m`.

It reads everything it will ever need, decodes one picture of each format, then locks itself in: another user
where it was root, no new privileges, bounded memory, and no new file descriptor of any kind, so neither a
file nor a socket. Time is the gateway's to limit, by killing. It never logs what it was sent.
"""

from __future__ import annotations

import base64
import gc
import os
import resource
import sys
from dataclasses import replace

from service.errors import ImageRejected
from service.processes.parent import Parent, name_process
from service.processes.sandbox import Confinement, Measure, confine
from service.processes.wire import Failure, Hello
from service.screening import FORMATS, ImageLimits
from service.screening.encode import encode, reencode
from service.screening.messages import (
    CleanReply,
    CleanRequest,
    EncodeReply,
    EncodeRequest,
    Rejected,
    vocabulary,
)
from service.screening.pixels import DecoderRefused, clean_image, decode, prepare
from service.screening.structure import walk

SCREENER_UID = 64_791
"""A user of its own, in a range that no distribution hands out."""

ADDRESS_SPACE_BYTES = 1024 * 1024 * 1024
"""Room for 40 million pixels as a progressive 4:4:4 JPEG: 240 MB of coefficients, twice 160 MB of pixels."""

WARM_UPS = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62r"
    "Z4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
    "pKT/wAARCAAIAAgDAREAAhEBAxEB/8QAFAABAAAAAAAAAAAAAAAAAAAABP/EABQQAQAAAAAAAAAAAAAAAAAAAAD/xAAVAQEBAAAAAAAA"
    "AAAAAAAAAAADBf/EABQRAQAAAAAAAAAAAAAAAAAAAAD/2gAMAwEAAhEDEQA/ABDWH//Z",
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAYAAADED76LAAAAFklEQVR4nGM8IWfznwEPYMInOXwUAAA1ugIxJghw+wAAAABJRU5ErkJggg==",
    "UklGRh4AAABXRUJQVlA4TBEAAAAvB8ABAAdQjyKXp/+BiOh/AAA=",
)
"""A red square of 8 × 8 as JPEG, PNG with alpha, and WebP."""

WARM_UP_LIMITS = ImageLimits(bytes=4096, pixels=4096, side=64, aspect=1, frames=1)


def main(arguments: list[str]) -> None:
    """`fd parent_pid` and the five limits, in the order of `ImageLimits`."""
    fd, parent_pid, *numbers = (int(argument) for argument in arguments)
    limits = ImageLimits(*numbers)
    parent = Parent(fd, parent_pid, vocabulary(limits))
    name_process("screener")
    _warm_up()
    prepare(limits)
    measures = _lock()
    parent.follow_to_death()
    gc.freeze()
    parent.send(Hello(pid=os.getpid(), sandbox=measures))
    while True:
        parent.send(answer(parent.receive(), limits))


def answer(message: object, limits: ImageLimits) -> CleanReply | EncodeReply | Rejected | Failure:
    """What to say to one message. Whatever goes wrong with an image is a `Rejected`."""
    if not isinstance(message, CleanRequest | EncodeRequest):
        return Failure(getattr(message, "id", 0), "not_asked")
    if isinstance(message, EncodeRequest) and message.format not in ("", *FORMATS):
        return Failure(message.id, "not_asked")
    try:
        return _clean(message, limits) if isinstance(message, CleanRequest) else _encode(message, limits)
    except ImageRejected as exc:
        limit = exc.limit if isinstance(exc.limit, int) else None
        return Rejected(
            message.id, exc.reason or "damaged", exc.detail, limit, isinstance(exc, DecoderRefused)
        )
    except MemoryError:
        return Rejected(
            message.id, "too_complex", "The image needs too much memory; scale it down.", None, spent=True
        )


def _clean(message: CleanRequest, limits: ImageLimits) -> CleanReply:
    cleaned = clean_image(message.image, limits)
    return CleanReply(
        message.id,
        cleaned.pixels,
        cleaned.width,
        cleaned.height,
        cleaned.format,
        cleaned.metadata,
        cleaned.trailing_bytes,
        cleaned.findings,
        cleaned.text,
    )


def _encode(message: EncodeRequest, limits: ImageLimits) -> EncodeReply:
    form = next(
        (name for name in FORMATS if name == message.format), None
    )  # `answer` knows no other but none
    again = reencode(message.image, form, limits)
    return EncodeReply(
        message.id, again.image, again.format, again.width, again.height, again.metadata, again.trailing_bytes
    )


def _warm_up() -> None:
    """Decode and write one picture of each format, so that no import or table is left to load behind the lock."""
    prepare(WARM_UP_LIMITS)
    for encoded in WARM_UPS:
        structure = walk(base64.b64decode(encoded), WARM_UP_LIMITS)
        pixels = decode(replace(structure, orientation=6), sizes=((28, 28),))
        encode(pixels, structure.format, WARM_UP_LIMITS)


def _lock() -> tuple[Measure, ...]:
    """Give up what decoding does not need, for good."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    no_writes = Measure("file_size", resource.getrlimit(resource.RLIMIT_FSIZE) == (0, 0), "0")
    return (
        no_writes,
        *confine(Confinement(uid=SCREENER_UID, open_files=0, address_space_bytes=ADDRESS_SPACE_BYTES)),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
