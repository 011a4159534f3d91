"""Structured logs: JSON lines on stderr, one sentence and one word from a closed list of actions each.

No text, image or key of any caller is ever logged: not as a field, and not inside an exception's message,
which is why errors are logged by type and by place (`where_it_broke`), never by message.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict

ACTIONS = frozenset(
    {
        "service_start",
        "service_ready",
        "service_stop",
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
    }
)


def configure(level: str) -> None:
    """Send this process's logs to stderr as JSON lines. Call once, at start."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            _add_level,
            _check_action,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )


def get_logger(name: str) -> Any:
    """A structlog logger; pass `action=` from `ACTIONS` with every line."""
    return structlog.get_logger(source=name)


def where_it_broke(exc: BaseException) -> str:
    """The innermost frames of an exception as `file:line function`, without its message."""
    frames = traceback.extract_tb(exc.__traceback__)[-3:]
    return " < ".join(
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames)
    )


def _add_level(_logger: object, method: str, event: EventDict) -> EventDict:
    event["level"] = method
    return event


def _check_action(_logger: object, _method: str, event: EventDict) -> EventDict:
    if event.get("action") not in ACTIONS:
        raise ValueError(f"log line without a known action: {event.get('action')!r}")
    return event
