"""From a walked file to pixels, and nothing but pixels: decode, flatten, orient, shrink.

The decoder is fed `Structure.core`, in which only what carries pixels is left, and the plugin that the walk
named is called by itself: no other format is ever tried. What comes out is a fresh buffer of RGB bytes.

Values are those of the reference, which calls `convert("RGB")` and pastes an alpha channel on white: profiles
and gamma are therefore ignored, not applied. Where the reference would show something else than a person
sees, a person is right: palette, grey-alpha and key transparency go on white too, 16-bit grey is shifted
instead of clipped, and EXIF's orientation is applied.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageFile, features
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from models import Pixels
from service.errors import ImageRejected
from service.screening import Cleaned, ImageFormat, ImageLimits, Structure, reject
from service.screening.resize import MAX_RATIO, plan_resizes
from service.screening.structure import walk

if TYPE_CHECKING:
    from collections.abc import Callable

_OPEN: dict[ImageFormat, Callable[[BytesIO], ImageFile.ImageFile]] = {
    "jpeg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
}

# EXIF orientation → what turns the stored picture upright.
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

# What Pillow's three decoders raise on a file that they cannot read, and warnings made errors.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)

WEBP_LEAST = (1, 3, 2)
"""The first libwebp without CVE-2023-4863."""

MORE_SCAN = bytes(range(1, 251)) * 2
"""Any bits will do, but for the one byte that begins a marker."""


class DecoderRefused(ImageRejected):
    """The decoder choked on the image. Its process has touched something odd and should not serve another."""


def prepare(limits: ImageLimits) -> None:
    """Set up this process for `clean_image`. Raises RuntimeError where a decoder is missing or unsafe."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = limits.pixels  # a second lock: `walk` has checked before
    if not (features.check("jpg") and features.check("zlib") and features.check("webp")):
        raise RuntimeError("Pillow lacks a decoder for JPEG, PNG or WebP")
    version = tuple(int(part) for part in str(features.version("webp")).split(".")[:3])
    if version < WEBP_LEAST:
        raise RuntimeError(f"libwebp {version} is older than {WEBP_LEAST}")


def clean_image(data: bytes, limits: ImageLimits) -> Cleaned:
    """Bytes to pixels. Raises `ImageRejected`: `DecoderRefused` where more than our own walk refused it."""
    structure = walk(data, limits)
    width, height = structure.width, structure.height
    if structure.orientation >= 5:
        width, height = height, width
    try:
        sizes = plan_resizes(height, width)
    except ValueError as exc:
        raise reject(
            "aspect",
            f"The image is {width} × {height} pixels, too long and thin for the model. Crop it.",
            MAX_RATIO,
        ) from exc
    return Cleaned(
        pixels=decode(structure, sizes),
        width=width,
        height=height,
        format=structure.format,
        metadata=tuple(sorted(structure.metadata)),
        trailing_bytes=structure.trailing_bytes,
    )


def decode(structure: Structure, sizes: tuple[tuple[int, int], ...] = ()) -> Pixels:
    """The picture of `structure`, upright, as RGB, resized to each (height, width) in turn.

    Raises `DecoderRefused` unless every row of it was decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with _OPEN[structure.format](BytesIO(structure.core)) as image:
                if image.size != (structure.width, structure.height):
                    raise ValueError("decoder and walk disagree on the size")
                image.load()
                if structure.format == "jpeg":
                    _check_tail(image, structure)
                flat = _flatten(image, structure)
    except _DECODER_ERRORS as exc:
        name = {"jpeg": "JPEG", "png": "PNG", "webp": "WebP"}[structure.format]
        raise DecoderRefused(f"The {name} is damaged and cannot be decoded.", reason="damaged") from exc
    except MemoryError as exc:
        raise DecoderRefused(
            "The image needs too much memory to decode; scale it down.", reason="too_complex"
        ) from exc
    if structure.orientation in _TURNS:
        flat = flat.transpose(_TURNS[structure.orientation])
    for height, width in sizes:
        flat = flat.resize((width, height), Image.Resampling.BICUBIC)
    return Pixels(flat.width, flat.height, flat.tobytes())


def _check_tail(image: Image.Image, structure: Structure) -> None:
    """Raises ValueError where a JPEG's scan ended before its picture did.

    libjpeg paints what is missing mid-grey and says nothing that Pillow passes on. So where the last pixel is
    mid-grey, decode again with more bytes at the scan's end: they change nothing unless they were needed.
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    if not all(126 <= level <= 129 for level in (last if isinstance(last, tuple) else (last or 0,))):
        return
    with JpegImageFile(BytesIO(structure.core[:-2] + MORE_SCAN + structure.core[-2:])) as again:
        again.load()
        if again.tobytes() != image.tobytes():
            raise ValueError("the scan ends before the picture")


def _flatten(image: Image.Image, structure: Structure) -> Image.Image:
    """RGB as a person sees it on white paper."""
    if structure.transparent is not None:
        image.info.pop("transparency", None)
        mask = _key_mask(image, structure)
        flat = _opaque(image)
        flat.paste((255, 255, 255), mask=mask)
        return flat
    if image.mode == "P" and "transparency" in image.info:
        return _on_white(image.convert("RGBA"))
    if image.mode == "LA":
        return _on_white(image.convert("RGBA"))
    if image.mode == "RGBA":
        return _on_white(image)
    return _opaque(image)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # `convert` clips 16-bit grey at 255. In memory a sample is low byte, high byte: keep the high one.
        image = Image.frombytes("L", image.size, image.tobytes("raw", "I;16")[1::2])
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """As the reference does it, to the bit (`qwen_vl_utils.vision_process.to_rgb`)."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _key_mask(image: Image.Image, structure: Structure) -> Image.Image:
    """255 where a pixel has exactly the value that tRNS makes transparent. Pillow compares 8 of 16 bits."""
    key = structure.transparent
    assert key is not None
    if image.mode.startswith("I;16"):
        samples = image.tobytes("raw", "I;16")
        halves = [Image.frombytes("L", image.size, samples[part::2]) for part in (1, 0)]
        return _all_equal(halves, [key[0] >> 8, key[0] & 255])
    if structure.channels == 1:
        return _all_equal([image.convert("L")], [key[0] * 255 // ((1 << structure.depth) - 1)])
    if structure.depth == 8:
        return _all_equal(list(image.split()), list(key))
    # 16-bit colour: Pillow keeps the high bytes; a second decode as if little-endian gives the low ones.
    with PngImageFile(BytesIO(structure.core)) as again:
        again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
        again.load()
        low = list(again.split())
    return _all_equal([*image.split(), *low], [value >> 8 for value in key] + [value & 255 for value in key])


def _all_equal(bands: list[Image.Image], values: list[int]) -> Image.Image:
    """255 where every band has its value, 0 elsewhere."""
    masks = [
        band.point([255 if level == value else 0 for level in range(256)])
        for band, value in zip(bands, values, strict=True)
    ]
    whole = masks[0]
    for mask in masks[1:]:
        whole = ImageChops.darker(whole, mask)
    return whole
