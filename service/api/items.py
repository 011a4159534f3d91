"""One side of a pair as JSON: its shapes, and the checks that make a `RawItem` of it.

An image is a `data:` URL or bare base64; or, where the tenant's Policy names hosts, the URL of one there, which is
noted here and fetched later. No string becomes a path. Every complaint is a `BadRequest` with the field, the limit and
what to do.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from service.asks import Ask, RawItem
from service.errors import BadRequest
from service.screening.locations import URL_CHARACTERS, read_location

MAX_DOCUMENTS = 1000
REPEATED_CHARACTERS = 80
"""Of a field's name or another complaint, so much is repeated to the caller: they may be as long as the body."""


class Strict(BaseModel):
    """A body, or a part of one: exact types, and no field that nobody knows."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ImageUrl(Strict):
    """OpenAI's and vLLM's wrapping of an image."""

    url: str = Field(
        description="A `data:image/…;base64,…` URL, or an `https:` one of a host that the tenant's policy names."
    )


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url", "image"]
    image_url: ImageUrl | str | None = None
    image: str | None = None


class Content(Strict):
    """vLLM's form: parts of text and at most one image; texts are joined without a separator."""

    content: list[Annotated[TextPart | ImagePart, Discriminator("type")]] = Field(min_length=1)


class TextAndImage(Strict):
    """Text, an image, or both. The image comes first in the model's prompt."""

    text: str | None = Field(
        None, description="Text of at most `text_length` characters (the tenant's policy)."
    )
    image: str | None = Field(
        None,
        description="A `data:` URL or bare base64 of a JPEG, PNG or WebP, or its `https:` URL where the policy allows.",
    )


def _kind(value: object) -> str | None:
    """The tag of a JSON value among the forms of a side; none where it is no side."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, dict):
        return "parts" if "content" in value else "object"
    return None


def string_or_object(value: object) -> str | None:
    """The tag of a JSON value where a side is one of these two."""
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, dict) else None


Side = Annotated[
    Annotated[str, Tag("string")] | Annotated[TextAndImage, Tag("object")] | Annotated[Content, Tag("parts")],
    Discriminator(
        _kind,
        custom_error_type="side",
        custom_error_message='must be a string, {"text", "image"} or {"content": [parts]}',
    ),
]


@dataclass(frozen=True, slots=True)
class Wrong:
    """The first thing that is wrong with a body, as Pydantic found it."""

    kind: str
    """Pydantic's name of it, for example `missing` or `too_short`."""
    field: str
    """Empty: the body as a whole."""
    limit: int | None
    words: str


def first_wrong(exc: ValidationError) -> Wrong:
    """What to tell of `exc`: the fields of the caller, no value of the body, cut to what a caller should read."""
    error: Any = exc.errors(include_url=False, include_input=False)[0]
    context = error.get("ctx", {})
    limit = next((context[key] for key in ("max_length", "le", "ge", "min_length") if key in context), None)
    words = context["error"] if error["type"] == "json_invalid" else error["msg"]
    return Wrong(error["type"], name_of(error["loc"]), limit, str(words)[: 2 * REPEATED_CHARACTERS])


def complaint(exc: ValidationError) -> BadRequest:
    """The first thing that is wrong, in words that name the field and the limit."""
    wrong = first_wrong(exc)
    field, limit = wrong.field, wrong.limit
    match wrong.kind:
        case "json_invalid":
            return BadRequest(f"The body is not valid JSON: {wrong.words}.")
        case "missing":
            detail = f"{field} is missing."
        case "extra_forbidden":
            detail = f"{field} is not a field of this request; remove it."
        case "too_short":
            detail = f"{field} is empty; send at least {limit}."
        case "too_long":
            detail = f"{field} is too long; at most {limit} fit into one request. Send them in several."
        case _:
            detail = f"{field or 'The body'}: {wrong.words}."
    return BadRequest(detail, field=field or None, limit=limit)


def name_of(location: tuple[int | str, ...]) -> str:
    """`("documents", 3, "object", "image")` is `documents[3].image`: the tags of unions are ours, not the caller's."""
    field = ""
    for before, part in zip((None, *location), location, strict=False):
        if before in ("query", "input") or (isinstance(before, int) and isinstance(part, str)):
            continue
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
    return field if len(field) <= REPEATED_CHARACTERS else f"{field[:REPEATED_CHARACTERS]}…"


def read_item(
    side: str | TextAndImage | Content,
    where: str,
    text_length: int,
    *,
    blank: bool = False,
    remote_hosts: tuple[str, ...] = (),
) -> RawItem:
    """One side, checked. `blank` lets a text pass that has nothing in it, or white space alone.

    An image may be fetched from `remote_hosts`; without any, remote images are off.
    """
    text: str | None
    image: str | None
    if isinstance(side, str):
        text, image, image_field = side, None, where
    elif isinstance(side, TextAndImage):
        text, image, image_field = side.text, side.image, f"{where}.image"
    else:
        text, image, image_field = _parts(side, where)
    if text is not None:
        check_text(text, where, text_length)
    if image is None and (text is None or not (blank or text.strip())):
        raise BadRequest(f"{where} is empty; give it a text, an image, or both.", field=where)
    if image is None:
        return RawItem(where, text)
    return read_image(image, image_field, where=where, text=text or None, remote_hosts=remote_hosts)


def read_image(
    image: str,
    image_field: str,
    *,
    where: str,
    text: str | None = None,
    remote_hosts: tuple[str, ...] = (),
) -> RawItem:
    """One side's image with its text: decoded, or the URL at which it may be fetched."""
    if image[:5].lower() != "data:" and "://" in image[:64]:
        check_url(image, image_field, remote_hosts)
        return RawItem(where, text, None, image, image_field, url=image)
    return RawItem(where, text, decode_image(image, image_field), image, image_field)


def check_url(url: str, where: str, remote_hosts: tuple[str, ...]) -> None:
    """Raises `BadRequest` for a URL that no image may be fetched from."""
    if not remote_hosts:
        raise BadRequest(
            "Remote images are off; send the image itself as a data: URL or base64.", field=where
        )
    location = read_location(url)
    if location is None:
        raise BadRequest(
            f"An image's URL must be https://host/path in printable ASCII, at most {URL_CHARACTERS} characters,"
            " without a user and on the usual port.",
            field=where,
            limit=URL_CHARACTERS,
        )
    if location.host not in remote_hosts:
        raise BadRequest(
            "The tenant's policy does not name the host of this URL; send the image itself as a data: URL or base64.",
            field=where,
        )


def check_text(text: str, where: str, text_length: int) -> None:
    """Raises `BadRequest` for a text that is too long, or that no database can hold."""
    if len(text) > text_length:
        raise BadRequest(
            f"{where} has {len(text)} characters; the limit is {text_length}. Shorten or split it.",
            field=where,
            limit=text_length,
        )
    if "\x00" in text:
        raise BadRequest(f"{where} holds a NUL character; remove it.", field=where)


def check_count(count: int, limit: int, field: str = "documents") -> None:
    """Raises `BadRequest` for more documents than the tenant may send at once."""
    if count > limit:
        raise BadRequest(
            f"At most {limit} documents fit into one request; send them in several.", field=field, limit=limit
        )


def check_images(ask: Ask, limit: int) -> None:
    """Raises `BadRequest` for more images than the tenant may send at once."""
    if len(ask.images) > limit:
        raise BadRequest(
            f"At most {limit} images fit into one request of this tenant, query included; send fewer.",
            field=ask.images[limit].image_where,
            limit=limit,
        )


def _parts(side: Content, where: str) -> tuple[str | None, str | None, str]:
    texts = [part.text for part in side.content if isinstance(part, TextPart)]
    images = []
    for index, part in enumerate(side.content):
        if isinstance(part, ImagePart):
            source = part.image_url.url if isinstance(part.image_url, ImageUrl) else part.image_url
            given = [value for value in (source, part.image) if value is not None]
            if len(given) != 1:
                raise BadRequest(
                    "An image part needs exactly one of image_url and image.",
                    field=f"{where}.content[{index}]",
                )
            images.append((given[0], f"{where}.content[{index}].image_url"))
    if len(images) > 1:
        raise BadRequest("The model takes one image a side; send one.", field=images[1][1], limit=1)
    image, image_field = images[0] if images else (None, where)
    return "".join(texts) if texts else None, image, image_field


def decode_image(value: str, where: str) -> bytes:
    """The bytes of a `data:` URL or of bare base64. Raises `BadRequest` that names `where`."""
    if value[:5].lower() == "data:":
        header, comma, payload = value.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise BadRequest("A data: URL must hold base64: data:image/png;base64,…", field=where)
    else:
        payload = value
    try:
        decoded = binascii.a2b_base64(payload, strict_mode=True)
    except (binascii.Error, ValueError):
        raise BadRequest(
            "The image is not valid base64 (RFC 4648, padded, no line breaks).", field=where
        ) from None
    if not decoded:
        raise BadRequest("The image is empty.", field=where)
    return decoded
