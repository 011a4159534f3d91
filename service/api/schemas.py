"""The bare `/v1/rerank`: one documented union of what Cohere, Jina, Voyage and vLLM clients send, and the answer.

`read(body)` turns bytes into an `Ask`; every complaint is a `BadRequest` with the field, the limit and what to do.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from service.api.items import (
    MAX_DOCUMENTS,
    Side,
    Strict,
    check_count,
    check_images,
    check_text,
    complaint,
    read_item,
)
from service.asks import Ask
from service.errors import BadRequest
from tenants.sessions import DEFAULT_TTL_S, LONGEST_S

Value = TypeVar("Value", str, int)


class RerankRequest(Strict):
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


class SessionRequest(Strict):
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


class ScreenedItem(BaseModel):
    """One item that reached a threshold of its tenant, or that could not be screened whole."""

    item: str = Field(description="Its name in the request: `documents[3]`, `query.image`.")
    category: str | None = Field(description="`null` where a detector was missing.")
    score: float = Field(description="Its risk, 0 to 1, rounded to two digits.")
    threshold: float = Field(description="The tenant's, from which on something is done.")
    rule: str = Field(description="Which rule weighed most. It never says what was found.")
    action: Literal["flag", "demote", "mask", "refuse"] = Field(description="What was done.")


class Meta(BaseModel):
    api_version: ApiVersion
    billed_units: BilledUnits
    warnings: list[str]
    session: SessionUse | None = Field(None, description="Only where the request named a session.")
    screening: list[ScreenedItem] | None = Field(
        None, description="Only where an item was flagged, demoted or masked."
    )


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
    screening: list[ScreenedItem] | None = Field(
        None, description="Of `content_refused`: all that refuses the request."
    )
    errors: list[FieldProblem] | None = Field(None, description="Each thing that is wrong, and all of them.")


def read(
    body: bytes,
    *,
    text_length: int,
    documents_limit: int,
    images_limit: int,
    remote_hosts: tuple[str, ...] = (),
) -> tuple[Ask, str | None]:
    """Parse and check a request body against the tenant's limits (characters, documents, images, remote hosts).

    Returns the ask and the model it names. Raises `BadRequest`.
    """
    try:
        request = RerankRequest.model_validate_json(body)
    except ValidationError as exc:
        raise complaint(exc) from None
    check_count(len(request.documents), documents_limit)
    top_n = _one_of(request.top_n, request.top_k, "top_n", "top_k") or len(request.documents)
    if top_n > len(request.documents):
        raise BadRequest(
            f"More results than documents are asked for; ask for at most {len(request.documents)}.",
            field="top_n" if request.top_n is not None else "top_k",
            limit=len(request.documents),
        )
    instruction = _one_of(request.instruction, request.instruct, "instruction", "instruct")
    if instruction is not None:
        check_text(instruction, "instruction", text_length)
    ask = Ask(
        query=read_item(request.query, "query", text_length, remote_hosts=remote_hosts),
        documents=tuple(
            read_item(side, f"documents[{index}]", text_length, remote_hosts=remote_hosts)
            for index, side in enumerate(request.documents)
        ),
        instruction=instruction,
        top_n=top_n,
        return_documents=request.return_documents,
        max_tokens_per_doc=request.max_tokens_per_doc,
        session=request.session_id,
        truncate=request.truncation,
    )
    check_images(ask, images_limit)
    return ask, request.model


def read_session(body: bytes) -> int:
    """The `ttl_s` of a request to open a session; none, or an empty body, is the default. Raises `BadRequest`."""
    try:
        return SessionRequest.model_validate_json(body or b"{}").ttl_s
    except ValidationError as exc:
        raise complaint(exc) from None


def _one_of(first: Value | None, second: Value | None, name: str, other: str) -> Value | None:
    if first is not None and second is not None and first != second:
        raise BadRequest(f"{name} and {other} mean the same and differ; send one of them.", field=other)
    return first if first is not None else second
