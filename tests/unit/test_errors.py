"""One table from every error to HTTP: whatever can reach the edge is in it, and nothing else says a word."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from inspect import isabstract
from uuid import uuid4

import pytest

import models
from models import JobExpired, JobTooLong, ModelError, ModelFailed, ModelRefused
from service.errors import (
    CLIENT_CLOSED,
    TABLE,
    DocumentTooLong,
    ImageRejected,
    InvalidAlerts,
    ServiceError,
    describe,
)
from service.processes.children import ChildLost
from service.processes.wire import WireError
from tenants.errors import (
    EntryInvalid,
    InvalidIdentities,
    KeyMalformed,
    KeySetInvalid,
    KeyUnknown,
    ProofInvalid,
    QuotaExceeded,
    ReceiptPending,
    RequestTooCostly,
    SchemaOutdated,
    SealBroken,
    SilenceNotFound,
    TenancyError,
    TenantSuspended,
    Unauthenticated,
    UnsafeRole,
)

NOT_AT_THE_EDGE: dict[type[Exception], str] = {
    ModelRefused: "a worker that is starting; callers get ModelUnavailable",
    JobExpired: "a worker; its caller got DeadlineExceeded at the same moment",
    EntryInvalid: "a bug of ours, or a log that was altered: a 500 without a word, and an alarm",
    ProofInvalid: "a log that was altered: whoever verifies is told; to a caller a 500 without a word",
    SealBroken: "a wrong master key: a 500 without a word, and an alarm",
    InvalidIdentities: "the start, which it ends",
    InvalidAlerts: "the start, which it ends",
    SilenceNotFound: "the command line, which alone ends silences",
    KeySetInvalid: "beside the requests: the log; callers get KeySetMissing once no keys are left",
    UnsafeRole: "the start, which it ends",
    SchemaOutdated: "the start, which it ends",
}
"""What is deliberately not in the table, and where it ends instead."""


def descendants(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        if child.__module__.split(".")[0] in ("service", "tenants", "models"):
            yield child
        yield from descendants(child)


EVERY = sorted(
    {kind for root in (ServiceError, TenancyError, ModelError) for kind in descendants(root)},
    key=lambda kind: f"{kind.__module__}.{kind.__name__}",
)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_error_is_in_the_table_or_said_not_to_reach_it(kind: type[Exception]) -> None:
    in_table = any(parent in TABLE for parent in kind.__mro__)
    assert in_table != (kind in NOT_AT_THE_EDGE), "in the table, or listed above with the reason; not both"


def test_every_tree_was_walked() -> None:
    assert {kind.__module__.split(".")[0] for kind in EVERY} == {"service", "tenants", "models"}
    assert set(TABLE) <= set(EVERY) and set(NOT_AT_THE_EDGE) <= set(EVERY)
    assert len(EVERY) >= 30
    assert not any(isabstract(kind) for kind in EVERY)


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_every_row_is_an_error_status_with_a_code_and_a_sentence(kind: type[Exception]) -> None:
    meaning = TABLE[kind]
    assert meaning.status == CLIENT_CLOSED or HTTPStatus(meaning.status).value >= 400
    assert meaning.code.replace("_", "").isalpha() and meaning.code.islower()
    assert (meaning.retry_after_s is not None) == (meaning.status == 503 or kind is ReceiptPending)
    first = (kind.__doc__ or "").splitlines()[0]
    assert first.endswith(".") and "/" not in first


def test_one_code_has_one_status() -> None:
    statuses: dict[str, set[int]] = {}
    for meaning in TABLE.values():
        statuses.setdefault(meaning.code, set()).add(meaning.status)
    assert {code: found for code, found in statuses.items() if len(found) > 1} == {}


SECRET = "postgresql://app:hunter2@10.0.0.7/pericarp select * from tenant acme /srv/pericarp/x.py"


@pytest.mark.parametrize(
    "exc",
    [
        ValueError(SECRET),
        KeyError(SECRET),
        RuntimeError(SECRET),
        OSError(2, SECRET, "/etc/shadow"),
        AssertionError(SECRET),
        ExceptionGroup(SECRET, [ValueError(SECRET)]),
        SchemaOutdated(SECRET),
        SealBroken(SECRET),
        UnsafeRole(SECRET),
        ChildLost(SECRET),
        WireError(SECRET),
        ModelError(SECRET),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_an_error_that_is_not_in_the_table_is_a_500_without_a_word(exc: Exception) -> None:
    trouble = describe(exc)
    assert (trouble.status, trouble.code) == (500, "internal")
    assert (trouble.field, trouble.limit, trouble.reason, trouble.retry_after_s) == (None, None, None, None)
    assert trouble.detail == describe(ZeroDivisionError()).detail
    assert trouble.type_uri == "about:blank"


@pytest.mark.parametrize(
    "exc",
    [
        KeyMalformed(),
        KeyUnknown(reason="revoked", tenant=uuid4(), key_id="abcdefghijkl"),
        KeyUnknown(reason="expired"),
        KeyUnknown(reason="wrong_secret"),
        Unauthenticated(reason="unknown"),
    ],
)
def test_every_reason_for_an_unknown_caller_reads_the_same(exc: Exception) -> None:
    assert describe(exc) == describe(KeyMalformed())


@pytest.mark.parametrize(
    "kind", [ModelFailed, JobTooLong, models.ModelNotFound], ids=lambda kind: kind.__name__
)
def test_a_domain_error_speaks_by_its_docstring_never_by_its_message(kind: type[Exception]) -> None:
    assert describe(kind(SECRET)).detail == (kind.__doc__ or "").splitlines()[0]


def test_a_suspended_tenant_s_name_and_key_stay_inside() -> None:
    tenant = uuid4()
    trouble = describe(TenantSuspended(tenant=tenant, key_id="abcdefghijkl"))
    assert trouble.status == 403
    assert str(tenant) not in str(trouble) and "abcdefghijkl" not in str(trouble)


def test_a_used_up_limit_says_which_and_when_to_come_back() -> None:
    trouble = describe(QuotaExceeded(violated=("images", "requests"), retry_after_s=7))
    assert (trouble.status, trouble.retry_after_s, trouble.violated) == (429, 7, ("images", "requests"))
    assert "images, requests" in trouble.detail and "7 s" in trouble.detail
    assert trouble.type_uri.endswith("#quota-exceeded")


def test_a_request_that_can_never_pass_has_no_time_to_come_back() -> None:
    trouble = describe(RequestTooCostly(limit="images", cost=30, at_once=20))
    assert (trouble.status, trouble.retry_after_s) == (422, None)
    assert (trouble.limit, trouble.reason) == (20, "images")
    assert "30 images" in trouble.detail


@pytest.mark.parametrize("kind", [kind for kind, meaning in TABLE.items() if meaning.status in (429, 503)])
def test_whoever_is_to_come_back_is_told_when(kind: type[Exception]) -> None:
    exc = QuotaExceeded(violated=("requests",), retry_after_s=3) if kind is QuotaExceeded else kind()
    assert (describe(exc).retry_after_s or 0) >= 1


def test_an_errors_own_time_to_come_back_goes_before_the_tables() -> None:
    from service.errors import Overloaded

    assert describe(Overloaded()).retry_after_s == 1
    assert describe(Overloaded(retry_after_s=30)).retry_after_s == 30


def test_a_document_that_may_not_be_cut_is_named_with_what_would_fit() -> None:
    trouble = describe(DocumentTooLong(3, 4096))
    assert (trouble.status, trouble.code) == (422, "document_too_long")
    assert (trouble.field, trouble.limit) == ("documents[3]", 4096)
    assert "documents[3]" in trouble.detail and "4096 tokens" in trouble.detail


def test_a_service_error_carries_what_its_caller_needs() -> None:
    exc = ImageRejected("Too large.", field="query.image", limit=5, reason="too_many_bytes")
    trouble = describe(exc)
    assert (trouble.status, trouble.title) == (422, "Unprocessable Entity")
    assert (trouble.detail, trouble.field, trouble.limit, trouble.reason) == (
        *("Too large.", "query.image", 5, "too_many_bytes"),
    )
    assert str(exc) == "Too large."
    assert ImageRejected().detail == ImageRejected.__doc__
