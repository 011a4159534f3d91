"""What can go wrong at the edge, and the ONE table from any domain error to HTTP.

    ServiceError
    ├── BadRequest          the request is wrong; `field` says where
    ├── BodyTooLarge        more bytes than the door lets in
    ├── NotFound            no such path, model or object
    ├── MethodNotAllowed
    ├── ImageRejected       an image that no model should see; `field` says which
    ├── Overloaded          no room in a queue; come back after `retry_after_s`
    ├── WorkerLost          the worker died, and so did its replacement
    ├── ScreeningLost       no screening child answers
    └── DeadlineExceeded    the answer would have come too late

`service/`, `tenants/` and `models/` raise their own errors; only `describe` knows what HTTP makes of them.
Whatever is not in the table is a 500 without a word of detail.
"""

from __future__ import annotations

from dataclasses import dataclass

from models import JobTooLong, ModelFailed, ModelNotFound


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
    ) -> None:
        """`detail`, `field`, `limit` and `reason` reach the caller: no path, SQL, host or foreign id in them."""
        self.detail = detail or type(self).__doc__ or ""
        self.field = field
        self.limit = limit
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.headers = headers or {}
        super().__init__(self.detail)


class BadRequest(ServiceError):
    """The request is not valid."""


class BodyTooLarge(ServiceError):
    """The request body is larger than this service accepts."""


class NotFound(ServiceError):
    """There is nothing here."""


class MethodNotAllowed(ServiceError):
    """This path does not take that method."""


class ImageRejected(ServiceError):
    """The image cannot be used. `reason` is one of `service.screening.REASONS`."""


class Overloaded(ServiceError):
    """The service is busy. Try again shortly."""


class WorkerLost(ServiceError):
    """The worker stopped while it was computing. Try again."""


class ScreeningLost(ServiceError):
    """The image screening stopped while it was working. Try again."""


class DeadlineExceeded(ServiceError):
    """The request took longer than its deadline."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What HTTP makes of one error type."""

    status: int
    code: str
    retry_after_s: int | None = None


TABLE: dict[type[Exception], Meaning] = {
    BadRequest: Meaning(422, "invalid_request"),
    BodyTooLarge: Meaning(413, "body_too_large"),
    NotFound: Meaning(404, "not_found"),
    MethodNotAllowed: Meaning(405, "method_not_allowed"),
    ImageRejected: Meaning(422, "image_rejected"),
    Overloaded: Meaning(503, "overloaded", 1),
    WorkerLost: Meaning(503, "worker_lost", 1),
    ScreeningLost: Meaning(503, "screening_lost", 1),
    DeadlineExceeded: Meaning(504, "deadline_exceeded"),
    JobTooLong: Meaning(422, "query_too_long"),
    ModelNotFound: Meaning(404, "model_not_found"),
    ModelFailed: Meaning(502, "model_failed"),
}
