"""The bare `/v1/rerank`: one documented union of what Cohere, Jina, Voyage and vLLM clients send, and the answer.

`read(body)` turns bytes into an `Ask`; every complaint is a `BadRequest` with the field, the limit and what to do.
An image is a `data:` URL or bare base64; nothing is ever fetched, and no string becomes a path.
"""

from __future__ import annotations

import binascii
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from service.asks import Ask, RawItem
from service.errors import BadRequest
from tenants.sessions import DEFAULT_TTL_S, LONGEST_S

MAX_DOCUMENTS = 1000
REPEATED_CHARACTERS = 80
"""Of a field's name or another complaint, so much is repeated to the caller: they may be as long as the body."""

Value = TypeVar("Value", str, int)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ImageUrl(_Strict):
    """OpenAI's and vLLM's wrapping of an image."""

    url: str = Field(description="A `data:image/…;base64,…` URL. Remote URLs are refused.")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image_url", "image"]
    image_url: ImageUrl | str | None = None
    image: str | None = None


class Content(_Strict):
    """vLLM's form: parts of text and at most one image; texts are joined without a separator."""

    content: list[Annotated[TextPart | ImagePart, Discriminator("type")]] = Field(min_length=1)


class TextAndImage(_Strict):
    """Text, an image, or both. The image comes first in the model's prompt."""

    text: str | None = Field(
        None, description="Text of at most `text_length` characters (the tenant's policy)."
    )
    image: str | None = Field(None, description="A `data:` URL or bare base64 of a JPEG, PNG or WebP.")


def _kind(value: object) -> str | None:
    if isinstance(value, str):
        return "string"
    if isinstance(value, dict):
        return "parts" if "content" in value else "object"
    return None


Side = Annotated[
    Annotated[str, Tag("string")] | Annotated[TextAndImage, Tag("object")] | Annotated[Content, Tag("parts")],
    Discriminator(
        _kind,
        custom_error_type="side",
        custom_error_message='must be a string, {"text", "image"} or {"content": [parts]}',
    ),
]


class RerankRequest(_Strict):
    """One query and the documents to put in order."""

    model: str | None = Field(
        None, description="The served model's name (`GET /v1/models`); may be left out."
    )
    query: Side = Field(description="What is looked for.")
    documents: list[Side] = Field(
        min_length=1, max_length=MAX_DOCUMENTS, description="Candidates, 1 to 1,000."
    )
    instruction: str | None = Field(
        None, min_length=1, description="What relevant means; the reference's default if absent."
    )
    instruct: str | None = Field(None, min_length=1, description="Another name of `instruction`.")
    top_n: int | None = Field(None, ge=1, description="How many results to return; all if absent.")
    top_k: int | None = Field(None, ge=1, description="Another name of `top_n`.")
    return_documents: bool = Field(False, description="Repeat each document in its result.")
    max_tokens_per_doc: int | None = Field(
        None, ge=1, le=131_072, description="Cut a document's text after so many tokens."
    )
    truncation: bool = Field(
        True, description="Cut a document's text where it is too long; if false, refuse the request."
    )
    session_id: str | None = Field(
        None, description="An open session of this tenant (`POST /v1/sessions`), to reuse what it keeps."
    )


class SessionRequest(_Strict):
    """How long a session may go without use."""

    ttl_s: int = Field(
        DEFAULT_TTL_S,
        ge=1,
        le=LONGEST_S,
        description="Seconds after its last use, or its opening, at which it expires.",
    )


class Result(BaseModel):
    """One document's place."""

    index: int = Field(description="Position in the request's `documents`.")
    relevance_score: float = Field(description="sigmoid(z_yes - z_no), 0 to 1.")
    document: dict[str, str] | None = Field(None, description="Only with `return_documents`.")


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    image_tokens: int


class ApiVersion(BaseModel):
    version: str


class BilledUnits(BaseModel):
    search_units: int
    images: int
    input_tokens: int


class SessionUse(BaseModel):
    """What a session spared."""

    id: str
    reused_images: int = Field(description="Distinct images whose features were at hand.")
    computed_tokens: int = Field(description="Tokens that were computed, where `prompt_tokens` were read.")


class Meta(BaseModel):
    api_version: ApiVersion
    billed_units: BilledUnits
    warnings: list[str]
    session: SessionUse | None = Field(None, description="Only where the request named a session.")


class RerankAnswer(BaseModel):
    """Results by falling relevance; equal scores keep the order of the request."""

    id: str
    model: str
    results: list[Result]
    usage: Usage
    meta: Meta


class SessionAnswer(BaseModel):
    """An open session. Times are UTC, by the database's clock."""

    id: str
    object: Literal["session"]
    created_at: datetime
    expires_at: datetime = Field(description="`ttl_s` after the last use, never later than `ends_at`.")
    ends_at: datetime = Field(description="However often it is used.")
    ttl_s: int
    last_used_at: datetime | None
    requests: int = Field(description="How many requests named it.")


class OpenSessions(BaseModel):
    """The tenant's open sessions, newest first."""

    object: Literal["list"]
    data: list[SessionAnswer]


class FieldProblem(BaseModel):
    """One thing that is wrong."""

    field: str
    detail: str


class Problem(BaseModel):
    """Every error: RFC 9457 problem details, with the field and the limit where there is one."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    field: str | None = None
    limit: int | str | None = None
    reason: str | None = None
    violated_policies: list[str] | None = Field(None, alias="violated-policies")
    errors: list[FieldProblem] | None = Field(None, description="Each thing that is wrong, and all of them.")


def read(body: bytes, *, text_length: int, documents_limit: int, images_limit: int) -> tuple[Ask, str | None]:
    """Parse and check a request body against the tenant's limits (characters, documents, images).

    Returns the ask and the model it names. Raises `BadRequest`.
    """
    try:
        request = RerankRequest.model_validate_json(body)
    except ValidationError as exc:
        raise _complaint(exc) from None
    if len(request.documents) > documents_limit:
        raise BadRequest(
            f"At most {documents_limit} documents fit into one request; send them in several.",
            field="documents",
            limit=documents_limit,
        )
    top_n = _one_of(request.top_n, request.top_k, "top_n", "top_k") or len(request.documents)
    if top_n > len(request.documents):
        raise BadRequest(
            f"More results than documents are asked for; ask for at most {len(request.documents)}.",
            field="top_n" if request.top_n is not None else "top_k",
            limit=len(request.documents),
        )
    instruction = _one_of(request.instruction, request.instruct, "instruction", "instruct")
    if instruction is not None:
        _check_text(instruction, "instruction", text_length)
    ask = Ask(
        query=_item(request.query, "query", text_length),
        documents=tuple(
            _item(side, f"documents[{index}]", text_length) for index, side in enumerate(request.documents)
        ),
        instruction=instruction,
        top_n=top_n,
        return_documents=request.return_documents,
        max_tokens_per_doc=request.max_tokens_per_doc,
        session=request.session_id,
        truncate=request.truncation,
    )
    if len(ask.images) > images_limit:
        raise BadRequest(
            f"At most {images_limit} images fit into one request of this tenant, query included; send fewer.",
            field=ask.images[images_limit].image_where,
            limit=images_limit,
        )
    return ask, request.model


def read_session(body: bytes) -> int:
    """The `ttl_s` of a request to open a session; none, or an empty body, is the default. Raises `BadRequest`."""
    try:
        return SessionRequest.model_validate_json(body or b"{}").ttl_s
    except ValidationError as exc:
        raise _complaint(exc) from None


def _one_of(first: Value | None, second: Value | None, name: str, other: str) -> Value | None:
    if first is not None and second is not None and first != second:
        raise BadRequest(f"{name} and {other} mean the same and differ; send one of them.", field=other)
    return first if first is not None else second


def _item(side: str | TextAndImage | Content, where: str, text_length: int) -> RawItem:
    text: str | None
    image: str | None
    if isinstance(side, str):
        text, image, image_field = side, None, where
    elif isinstance(side, TextAndImage):
        text, image, image_field = side.text, side.image, f"{where}.image"
    else:
        text, image, image_field = _parts(side, where)
    if text is not None:
        _check_text(text, where, text_length)
    if image is None and (text is None or not text.strip()):
        raise BadRequest(f"{where} is empty; give it a text, an image, or both.", field=where)
    if image is None:
        return RawItem(where, text)
    return RawItem(where, text or None, _image_bytes(image, image_field), image, image_field)


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


def _check_text(text: str, where: str, text_length: int) -> None:
    if len(text) > text_length:
        raise BadRequest(
            f"{where} has {len(text)} characters; the limit is {text_length}. Shorten or split it.",
            field=where,
            limit=text_length,
        )
    if "\x00" in text:
        raise BadRequest(f"{where} holds a NUL character; remove it.", field=where)


def _image_bytes(value: str, where: str) -> bytes:
    if value[:5].lower() == "data:":
        header, comma, payload = value.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise BadRequest("A data: URL must hold base64: data:image/png;base64,…", field=where)
    elif "://" in value[:64]:
        raise BadRequest(
            "Remote images are off; send the image itself as a data: URL or base64.", field=where
        )
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


def _complaint(exc: ValidationError) -> BadRequest:
    """The first thing that is wrong, in words that name the field and the limit."""
    error: Any = exc.errors(include_url=False, include_input=False)[0]
    field = _field(error["loc"])
    context = error.get("ctx", {})
    limit = next((context[key] for key in ("max_length", "le", "ge", "min_length") if key in context), None)
    match error["type"]:
        case "json_invalid":
            return BadRequest(f"The body is not valid JSON: {context['error']}.")
        case "missing":
            detail = f"{field} is missing."
        case "extra_forbidden":
            detail = f"{field} is not a field of this request; remove it."
        case "too_short":
            detail = f"{field} is empty; send at least {limit}."
        case "too_long":
            detail = f"{field} is too long; at most {limit} fit into one request. Send them in several."
        case _:
            detail = f"{field or 'The body'}: {error['msg'][: 2 * REPEATED_CHARACTERS]}."
    return BadRequest(detail, field=field or None, limit=limit)


def _field(location: tuple[int | str, ...]) -> str:
    """`("documents", 3, "object", "image")` is `documents[3].image`: the tags of unions are ours, not the caller's."""
    field = ""
    for before, part in zip((None, *location), location, strict=False):
        if before == "query" or (isinstance(before, int) and isinstance(part, str)):
            continue
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
    return field if len(field) <= REPEATED_CHARACTERS else f"{field[:REPEATED_CHARACTERS]}…"
