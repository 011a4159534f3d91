"""The process that touches untrusted bytes: a file in, pixels and findings out. Started by `pool.py` as `python -m`.

It reads everything it will ever need (networks too), decodes one picture of each format, then locks itself in
(`processes/lock.py`), and decodes and looks once more: what the lock does not allow must not first be found out with
somebody's image. Time is the gateway's to limit, by killing. It never logs what it was sent.
"""

from __future__ import annotations

import base64
import gc
import os
import resource
import sys
from dataclasses import replace
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from models import Pixels
from service.errors import ImageRejected
from service.processes.lock import lock_in
from service.processes.parent import Parent, name_process
from service.processes.shared_memory import open_region
from service.processes.wire import Detector, Failure, Hello
from service.screening import FORMATS, ImageLimits
from service.screening.encode import encode, reencode
from service.screening.messages import (
    CleanReply,
    CleanRequest,
    EncodeReply,
    EncodeRequest,
    Equipment,
    Rejected,
    vocabulary,
)
from service.screening.pixels import DecoderRefused, clean_image, decode, prepare
from service.screening.signals import IMAGE_DETECTORS, Findings, ImageText, Looks
from service.screening.structure import walk

if TYPE_CHECKING:
    from service.screening.equipment import Eyes

SCREENER_UID = 64_791
"""A user of its own, in a range that no distribution hands out."""

DECODING_BYTES = 896 * 1024 * 1024
"""Address space beside what is loaded: room for 40 million pixels as a progressive 4:4:4 JPEG, which takes 240 MB of
coefficients and twice 160 MB of pixels."""

WARM_UPS = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62r"
    "Z4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
    "pKT/wAARCAAIAAgDAREAAhEBAxEB/8QAFAABAAAAAAAAAAAAAAAAAAAABP/EABQQAQAAAAAAAAAAAAAAAAAAAAD/xAAVAQEBAAAAAAAA"
    "AAAAAAAAAAADBf/EABQRAQAAAAAAAAAAAAAAAAAAAAD/2gAMAwEAAhEDEQA/ABDWH//Z",
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAYAAADED76LAAAAFklEQVR4nGM8IWfznwEPYMInOXwUAAA1ugIxJghw+wAAAABJRU5ErkJggg==",
    "UklGRh4AAABXRUJQVlA4TBEAAAAvB8ABAAdQjyKXp/+BiOh/AAA=",
)
"""A red square of 8 × 8 as JPEG, PNG with alpha, and WebP."""

BLIND = tuple(Detector(name, active=False) for name in IMAGE_DETECTORS)
"""What a child without equipment looks with."""

WARM_UP_PIXELS = Pixels(28, 28, bytes(28 * 28 * 3))

WARM_UP_LIMITS = ImageLimits(bytes=4096, pixels=4096, side=64, aspect=1, frames=1)


def main(arguments: list[str]) -> None:
    """`fd parent_pid region`, the five limits in the order of `ImageLimits`, and the equipment where there is any."""
    fd, parent_pid, shared, *numbers = (int(argument) for argument in arguments[:8])
    limits = ImageLimits(*numbers)
    parent = Parent(fd, parent_pid, vocabulary(limits), keep=[shared])
    name_process("screener")
    region = open_region(shared)
    eyes = _equip(arguments[8]) if len(arguments) > 8 else None
    _warm_up()
    measures = lock_in(parent, uid=SCREENER_UID, address_space_bytes=_address_space_bytes())
    _warm_up()
    if eyes is not None:
        eyes.look(WARM_UP_PIXELS, Looks(risk=True, text=ImageText.STRICT))
    prepare(limits)
    gc.freeze()
    parent.send(Hello(pid=os.getpid(), sandbox=measures, detectors=eyes.detectors if eyes else BLIND))
    parent.serve(partial(answer, limits=limits, region=region, eyes=eyes))


def answer(
    message: object, limits: ImageLimits, region: mmap, eyes: Eyes | None = None
) -> CleanReply | EncodeReply | Rejected | Failure:
    """What to say to one message; pixels go into `region`. Whatever goes wrong with an image is a `Rejected`."""
    if not isinstance(message, CleanRequest | EncodeRequest):
        return Failure(getattr(message, "id", 0), "not_asked")
    if isinstance(message, EncodeRequest) and message.format not in ("", *FORMATS):
        return Failure(message.id, "not_asked")
    try:
        return (
            _clean(message, limits, region, eyes)
            if isinstance(message, CleanRequest)
            else _encode(message, limits)
        )
    except ImageRejected as exc:
        limit = exc.limit if isinstance(exc.limit, int) else None
        return Rejected(
            message.id, exc.reason or "damaged", exc.detail, limit, isinstance(exc, DecoderRefused)
        )
    except MemoryError:
        return Rejected(
            message.id, "too_complex", "The image needs too much memory; scale it down.", None, spent=True
        )


def _clean(message: CleanRequest, limits: ImageLimits, region: mmap, eyes: Eyes | None) -> CleanReply:
    cleaned = clean_image(message.image, limits)
    pixels = cleaned.pixels
    findings, text = _look(pixels, message.looks, eyes)
    region[: len(pixels.data)] = pixels.data
    return CleanReply(
        message.id,
        pixels.width,
        pixels.height,
        cleaned.width,
        cleaned.height,
        cleaned.format,
        cleaned.metadata,
        cleaned.trailing_bytes,
        findings,
        text,
    )


def _look(pixels: Pixels, looks: Looks, eyes: Eyes | None) -> tuple[Findings, tuple[str, ...]]:
    if eyes is not None:
        return eyes.look(pixels, looks) if looks != Looks() else (Findings(), ())
    *risk, text = IMAGE_DETECTORS
    return Findings(failed=(*(risk if looks.risk else ()), *((text,) if looks.text != "off" else ()))), ()


def _equip(argument: str) -> Eyes:
    """Load what looks at images. It is imported only here: a child without it starts in a third of the time."""
    from service.screening.equipment import Eyes
    from service.screening.heads import BadHead
    from service.screening.plugins import BadPlugin

    try:
        eyes = Eyes(Equipment.from_argument(argument))
    except (BadHead, BadPlugin) as exc:
        sys.exit(f"not started: {exc}")
    eyes.warm_up()
    return eyes


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


def _address_space_bytes() -> int:
    """What is loaded, and room to decode in."""
    pages = int(
        Path("/proc/self/statm").read_text().split()[0]
    )  # proc(5): the whole program size comes first
    return pages * resource.getpagesize() + DECODING_BYTES


if __name__ == "__main__":
    main(sys.argv[1:])
