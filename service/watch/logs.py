"""Structured logs: JSON lines, one sentence and one word from a closed list of actions each.

No text, image or key of any caller is ever logged: not as a field (`redaction.py`), not by a library (`foreign.py`), and
not inside an exception's message, which is why errors are logged by type and by place (`where_it_broke`), never by message.
Whoever logs never waits for a disk or a pipe (`log_writer.py`).
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from service.watch.foreign import listen, where_it_broke
from service.watch.log_writer import Writer, write_stderr
from service.watch.redaction import redact

if TYPE_CHECKING:
    from structlog.typing import EventDict

__all__ = ["ACTIONS", "close", "configure", "get_logger", "request_of", "where_it_broke"]

ACTIONS = frozenset(
    {
        "service_start",
        "service_ready",
        "service_stop",
        "metrics_ready",
        "metrics_failed",
        "plaintext",
        "certificate_read",
        "certificate_failed",
        "request",
        "request_failed",
        "entry_failed",
        "worker_ready",
        "worker_lost",
        "worker_retire",
        "child_says",
        "hold_orphaned",
        "lease_lost",
        "usage_forgotten",
        "session_expired",
        "sweep_failed",
        "contained",
        "tenant_purged",
        "log_pruned",
        "thresholds_stepped",
        "upkeep_failed",
        "log_broken",
        "log_failed",
        "witness_cosigned",
        "witness_refused",
        "witness_contradicted",
        "witness_failed",
        "cosigning_failed",
        "cosigning_refused",
        "key_leaked",
        "issuer_keys",
        "issuer_keys_failed",
        "sandbox",
        "weights_lent",
        "weights_own",
        "weights_changed",
        "weights_lost",
        "library",
        "unforeseen",
        "log_dropped",
        "log_unwritable",
        "alert",
        "alert_failed",
        "alert_sent",
        "observation_failed",
        "key_suspended",
        "key_resumed",
        "suspension_withheld",
    }
)


def configure(
    level: str,
    *,
    folder: Callable[[bytes], None] | None = None,
    dropped: Callable[[int], None] | None = None,
) -> None:
    """Send this process's lines, and what libraries would print, to stderr as JSON. Call once, at start.

    They go to `folder` (a `LogFolder`) instead where there is one, and to stderr only while that fails. `dropped` is
    called with the number of lines that the writer could not keep up with, on the thread that logs. Lines are written by
    a thread of their own, to the end of the process.
    """
    global _writer
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            _add_level,
            _check_action,
            _add_request,
            _redact,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=_Output,
        cache_logger_on_first_use=True,
    )
    close()
    _writer = Writer(
        folder or write_stderr,
        fallback=write_stderr if folder else None,
        dropped=dropped,
        told=_tell_dropped,
        failed=_tell_failed,
    )
    listen(log)
    atexit.register(close)


def close() -> None:
    """Write what is left, for some seconds at most. What comes later is written at once."""
    if _writer is not None:
        _writer.close()


def get_logger(name: str) -> Any:
    """A structlog logger; pass `action=` from `ACTIONS` with every line."""
    return structlog.get_logger(source=name)


@contextmanager
def request_of(request_id: str, trace_id: str) -> Iterator[None]:
    """Every line that is logged inside, and in tasks that start there, has these two ids until the block ends."""
    request = _Request(request_id, trace_id)
    token = _request.set(request)
    try:
        yield
    finally:
        request.over = True
        _request.reset(token)


@dataclass(slots=True)
class _Request:
    request_id: str
    trace_id: str
    over: bool = False
    """A task that outlives the request that started it, a worker's say, speaks for itself from then on."""


_request: ContextVar[_Request | None] = ContextVar("request", default=None)
_writer: Writer | None = None

log = get_logger(__name__)


class _Output:
    """What structlog hands a finished line to, at any level."""

    def __init__(self, *_names: str) -> None:
        pass

    def msg(self, line: str) -> None:
        assert _writer is not None, "configure made it"
        _writer.write(line.encode("utf-8", "backslashreplace") + b"\n")

    debug = info = warning = error = critical = msg


def _tell_dropped(count: int) -> None:
    log.warning("lines of this log were dropped", action="log_dropped", count=count)


def _tell_failed(exc: OSError) -> None:
    log.error(
        "this log cannot be written where it should be",
        action="log_unwritable",
        error=type(exc).__name__,
        reason=exc.strerror,
    )


def _add_level(_logger: object, method: str, event: EventDict) -> EventDict:
    event["level"] = method
    return event


def _check_action(_logger: object, _method: str, event: EventDict) -> EventDict:
    if event.get("action") not in ACTIONS:
        raise ValueError(f"log line without a known action: {event.get('action')!r}")
    return event


def _add_request(_logger: object, _method: str, event: EventDict) -> EventDict:
    request = _request.get()
    if request is not None and not request.over:
        event.setdefault("request_id", request.request_id)
        event.setdefault("trace_id", request.trace_id)
    return event


def _redact(_logger: object, _method: str, event: EventDict) -> EventDict:
    return redact(event)
