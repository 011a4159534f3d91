"""What can go wrong at the edge, and the ONE table from any domain error to HTTP.

    ServiceError
    ├── BadRequest          the request is wrong; `field` says where
    ├── BodyTooLarge        more bytes than the door lets in
    ├── BodyTooSlow         fewer bytes than a deadline's worth of waiting deserves
    ├── Forbidden           the key's role may not do this
    │   └── Contained       an administrator stopped the key or its tenant while the request was under way
    ├── NotFound            no such path or object
    ├── PreconditionMissing a change that must name the version that it changes
    ├── ModelUnknown        the request names a model that is not served
    ├── ModelUnavailable    the model's files are not those that may be served
    ├── NotReady            no worker has scored its warm-up yet, or the database does not answer
    ├── MethodNotAllowed
    ├── DocumentTooLong     a document would have to be cut, and truncation is off; `field` says which
    ├── ImageRejected       an image that no model should see; `field` says which
    ├── ContentRefused      content above the tenant's own thresholds; `screening` says which, and why
    ├── Overloaded          no room in a queue; come back after `retry_after_s`
    ├── WorkerLost          the worker died, and so did its replacement
    ├── ScreeningLost       no screening child answers
    ├── ClientClosed        the caller hung up before the answer
    ├── LogUnavailable      the entry could not be written, so there is no answer
    ├── DeadlineExceeded    the answer would have come too late
    └── InvalidAlerts       the file of alerts is wrong

`service/`, `tenants/` and `models/` raise their own errors; only `describe` knows what HTTP makes of them.
Whatever is not in the table is a 500 without a word of detail.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from models import JobTooLong, ModelFailed, ModelNotFound
from tenants.errors import (
    DatabaseUnavailable,
    EntryNotFound,
    Fault,
    Invalid,
    InvalidKeyLimits,
    InvalidKeyRights,
    InvalidName,
    InvalidPolicy,
    KeyNotFound,
    KeySetMissing,
    LogBroken,
    PolicyChanged,
    QuotaExceeded,
    ReceiptNotFound,
    ReceiptPending,
    RepeatDiffers,
    RepeatUnderWay,
    RequestTooCostly,
    ReviewNotFound,
    ReviewRefused,
    RotationRefused,
    SearchExists,
    SearchNotFound,
    SessionNotFound,
    TenantExists,
    TenantNotFound,
    ThresholdNotFound,
    Unauthenticated,
)
from tenants.errors import (
    Forbidden as TenantForbidden,
)

CLIENT_CLOSED = 499
"""As nginx says it in its logs. HTTP has no such status, for there is nobody left to read it."""
PROBLEM_TYPES = "https://iana.org/assignments/http-problem-types"


class ServiceError(Exception):
    """The request could not be served."""

    def __init__(
        self,
        detail: str | None = None,
        *,
        field: str | None = None,
        limit: int | str | None = None,
        reason: str | None = None,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
        faults: tuple[Fault, ...] = (),
    ) -> None:
        """`detail`, `field`, `limit`, `reason` and `faults` (each thing that is wrong, where there may be several)
        reach the caller: no path, SQL, host or foreign id in them."""
        self.detail = detail or type(self).__doc__ or ""
        self.field = field
        self.limit = limit
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.headers = headers or {}
        self.faults = faults
        super().__init__(self.detail)


class BadRequest(ServiceError):
    """The request is not valid."""


class BodyTooLarge(ServiceError):
    """The request body is larger than this service accepts."""


class BodyTooSlow(ServiceError):
    """The request body did not arrive in time."""


class NotFound(ServiceError):
    """There is nothing here."""


class Forbidden(ServiceError):
    """This key may not do that."""


class PreconditionMissing(ServiceError):
    """This change must name the version that it changes, in If-Match."""


class Contained(Forbidden):
    """This key, or its tenant, was stopped."""


class ModelUnknown(ServiceError):
    """That model is not served here."""


class ModelUnavailable(ServiceError):
    """The model cannot be served: its files are not those that were signed. The operator has to look."""


class NotReady(ServiceError):
    """The service is not ready yet."""


class MethodNotAllowed(ServiceError):
    """This path does not take that method."""


class DocumentTooLong(ServiceError):
    """A document does not fit, and truncation is off."""

    def __init__(self, index: int, limit_tokens: int, *, where: str | None = None) -> None:
        """Of the text of document `index`, `limit_tokens` would have fitted; `where` is the caller's name of it."""
        where = where or f"documents[{index}]"
        super().__init__(
            f"Of the text of {where}, {limit_tokens} tokens fit. Shorten it, or leave truncation on.",
            field=where,
            limit=limit_tokens,
        )
        self.index = index
        self.limit_tokens = limit_tokens


class ImageRejected(ServiceError):
    """The image cannot be used.

    `reason` is one of `service.screening.REASONS`; `index` is the image's place among those of the request.
    """

    index: int | None = None


@dataclass(frozen=True, slots=True)
class Touched:
    """What screening did about one item, as its caller may read it: never what was found there, and no exact score."""

    item: str
    category: str | None
    """None where it is about no category: a detector is missing."""
    score: float
    threshold: float
    rule: str
    action: str


class ContentRefused(ServiceError):
    """Content of this request is above a threshold of its tenant."""

    def __init__(self, screening: tuple[Touched, ...]) -> None:
        """`screening` is all that refuses the request; the first is told in a sentence."""
        first = screening[0]
        if first.category is None:
            detail = (
                f"{first.item} could not be screened whole, and this tenant's policy refuses such content."
            )
        else:
            detail = f"{first.item} is refused: its risk of {first.category} is at or above this tenant's threshold."
        super().__init__(detail, field=first.item, reason=first.category or first.rule)
        self.screening = screening


class Overloaded(ServiceError):
    """The service is busy. Try again shortly."""


class WorkerLost(ServiceError):
    """The worker stopped while it was computing. Try again."""


class ScreeningLost(ServiceError):
    """The image screening stopped while it was working. Try again."""


class ClientClosed(ServiceError):
    """The caller closed the connection before the answer."""


class LogUnavailable(ServiceError):
    """The decision could not be written to the log, and nothing is answered without its entry. Try again."""


class DeadlineExceeded(ServiceError):
    """The request took longer than its deadline."""


class InvalidAlerts(ServiceError):
    """The file of alerts is wrong."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What HTTP makes of one error type."""

    status: int
    code: str
    retry_after_s: int | None = None


TABLE: dict[type[Exception], Meaning] = {
    BadRequest: Meaning(422, "invalid_request"),
    BodyTooLarge: Meaning(413, "body_too_large"),
    BodyTooSlow: Meaning(408, "body_too_slow"),
    Unauthenticated: Meaning(401, "unauthenticated"),
    Forbidden: Meaning(403, "forbidden"),
    TenantForbidden: Meaning(403, "forbidden"),
    QuotaExceeded: Meaning(429, "quota_exceeded"),
    RequestTooCostly: Meaning(422, "request_too_costly"),
    DatabaseUnavailable: Meaning(503, "database_unavailable", 1),
    KeySetMissing: Meaning(503, "issuer_unavailable", 2),
    ModelUnknown: Meaning(404, "model_not_found"),
    ModelUnavailable: Meaning(503, "model_unavailable", 30),
    NotReady: Meaning(503, "not_ready", 1),
    NotFound: Meaning(404, "not_found"),
    SessionNotFound: Meaning(404, "session_not_found"),
    TenantNotFound: Meaning(404, "tenant_not_found"),
    KeyNotFound: Meaning(404, "key_not_found"),
    ReviewNotFound: Meaning(404, "review_not_found"),
    ThresholdNotFound: Meaning(404, "threshold_not_found"),
    ReceiptNotFound: Meaning(404, "receipt_not_found"),
    ReceiptPending: Meaning(404, "receipt_pending", 1),
    EntryNotFound: Meaning(404, "entry_not_found"),
    SearchNotFound: Meaning(404, "search_not_found"),
    SearchExists: Meaning(409, "search_exists"),
    ReviewRefused: Meaning(409, "review_refused"),
    TenantExists: Meaning(409, "tenant_exists"),
    InvalidName: Meaning(422, "invalid_name"),
    Invalid: Meaning(422, "invalid_request"),
    InvalidPolicy: Meaning(422, "invalid_policy"),
    InvalidKeyLimits: Meaning(422, "invalid_key"),
    InvalidKeyRights: Meaning(422, "invalid_key"),
    RotationRefused: Meaning(409, "rotation_refused"),
    PreconditionMissing: Meaning(428, "precondition_missing"),
    RepeatDiffers: Meaning(422, "idempotency_key_reused"),
    RepeatUnderWay: Meaning(409, "request_under_way"),
    PolicyChanged: Meaning(412, "policy_changed"),
    MethodNotAllowed: Meaning(405, "method_not_allowed"),
    DocumentTooLong: Meaning(422, "document_too_long"),
    ImageRejected: Meaning(422, "image_rejected"),
    ContentRefused: Meaning(403, "content_refused"),
    Overloaded: Meaning(503, "overloaded", 1),
    WorkerLost: Meaning(503, "worker_lost", 1),
    ScreeningLost: Meaning(503, "screening_lost", 1),
    ClientClosed: Meaning(CLIENT_CLOSED, "client_closed"),
    LogUnavailable: Meaning(503, "log_unavailable", 1),
    LogBroken: Meaning(503, "log_broken", 60),
    DeadlineExceeded: Meaning(504, "deadline_exceeded"),
    JobTooLong: Meaning(422, "query_too_long"),
    ModelNotFound: Meaning(404, "model_not_found"),
    ModelFailed: Meaning(502, "model_failed"),
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """One error as a caller may see it."""

    status: int
    code: str
    detail: str
    field: str | None = None
    limit: int | str | None = None
    reason: str | None = None
    retry_after_s: int | None = None
    violated: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    faults: tuple[Fault, ...] = ()
    screening: tuple[Touched, ...] = ()

    @property
    def title(self) -> str:
        return "Client Closed Request" if self.status == CLIENT_CLOSED else HTTPStatus(self.status).phrase

    @property
    def type_uri(self) -> str:
        """IANA's problem type where there is one (draft-ietf-httpapi-ratelimit-headers), else about:blank."""
        return f"{PROBLEM_TYPES}#quota-exceeded" if self.status == 429 else "about:blank"


def describe(exc: BaseException) -> Trouble:
    """What a caller may know of `exc`. An error that is not in the table is a 500 without a word of detail."""
    kind = next((parent for parent in type(exc).__mro__ if parent in TABLE), None)
    if kind is None:
        return Trouble(
            500, "internal", "Something broke on our side; the request id helps us to find out what."
        )
    meaning = TABLE[kind]
    if isinstance(exc, ServiceError):
        return Trouble(
            meaning.status,
            meaning.code,
            exc.detail,
            exc.field,
            exc.limit,
            exc.reason,
            exc.retry_after_s or meaning.retry_after_s,
            headers=tuple(exc.headers.items()),
            faults=exc.faults,
            screening=exc.screening if isinstance(exc, ContentRefused) else (),
        )
    if isinstance(exc, QuotaExceeded):
        return Trouble(
            meaning.status,
            meaning.code,
            f"Used up: {', '.join(exc.violated)}. Try again in {exc.retry_after_s} s.",
            retry_after_s=exc.retry_after_s,
            violated=exc.violated,
        )
    if isinstance(exc, Invalid):
        first = exc.faults[0]
        detail = f"{_first_line(kind)} {first.field or 'It'}: {first.why}."
        return Trouble(meaning.status, meaning.code, detail, field=first.field or None, faults=exc.faults)
    if isinstance(exc, InvalidName):  # its message is the rule that was broken, and says nothing else
        return Trouble(meaning.status, meaning.code, f"{str(exc)[:1].upper()}{str(exc)[1:]}.", field="name")
    if isinstance(exc, RotationRefused):  # so is this one
        return Trouble(meaning.status, meaning.code, str(exc))
    if isinstance(exc, RequestTooCostly):
        return Trouble(
            meaning.status,
            meaning.code,
            f"At most {exc.cost} {exc.limit} would be needed, and {exc.at_once} fit at once; waiting does not help."
            " Ask for less at a time.",
            limit=exc.at_once,
            reason=exc.limit,
        )
    # A domain error's own message may name what no caller should see; its docstring is written for callers.
    return Trouble(meaning.status, meaning.code, _first_line(kind), retry_after_s=meaning.retry_after_s)


def _first_line(kind: type[Exception]) -> str:
    return (kind.__doc__ or "").split("\n")[0]
