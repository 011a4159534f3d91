"""Entries as files: each format writes a line of one entry. Pure.

JSON lines hold the entry's bytes as they stand in the log. CSV is flat, and no cell of it begins a spreadsheet's formula
(OWASP, CSV injection). OCSF is version 1.9.0, class API Activity (6003) with the profile `record_integrity`: a SHA-256
over the event's canonical JSON (RFC 8785) without that fingerprint itself.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import orjson

from service import __version__

if TYPE_CHECKING:
    from tenants.search import Found

OCSF_VERSION = "1.9.0"
API_ACTIVITY = 6003
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
COLUMNS = (
    *(
        "id",
        "recorded_at",
        "tenant",
        "request_id",
        "at",
        "key_id",
        "role",
        "operation",
        "decision",
        "code",
        "status",
    ),
    *(
        "action",
        "category",
        "risk",
        "session",
        "client",
        "documents",
        "images",
        "input_tokens",
        "image_tokens",
    ),
    *("model", "model_digest", "query_text", "query_image"),
)


@dataclass(frozen=True, slots=True)
class Form:
    """How entries are written."""

    media_type: str
    suffix: str
    line: Callable[[Found], bytes]
    head: bytes = b""


def tell(found: Found) -> dict[str, Any]:
    """An entry as the API shows it; `body` are its bytes as they stand, which are JSON."""
    return {
        "object": "entry",
        "id": str(found.id),
        "tenant": str(found.tenant),
        "recorded_at": moment(found.recorded_at),
        "schema_version": found.schema_version,
        "body": orjson.Fragment(found.body),
    }


def summary(found: Found) -> dict[str, Any]:
    """An entry in the words of one line."""
    body = orjson.loads(found.body)
    named = ("operation", "decision", "code", "status", "key_id")
    action = body.get("details", {}).get("screening", {}).get("action", "")
    told = {
        "id": str(found.id),
        "tenant": str(found.tenant),
        "recorded_at": found.recorded_at,
        "action": action,
    }
    return told | {name: body[name] for name in named}


def moment(at: datetime) -> str:
    """RFC 3339 in UTC, always with microseconds."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _json_line(found: Found) -> bytes:
    return orjson.dumps(tell(found), option=orjson.OPT_APPEND_NEWLINE)


def _csv_row(cells: tuple[object, ...]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(map(_cell, cells))  # RFC 4180
    return text.getvalue().encode()


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _csv_line(found: Found) -> bytes:
    body = orjson.loads(found.body)
    screening = body.get("details", {}).get("screening", {})
    risk, category = _highest(screening)
    return _csv_row(
        (
            str(found.id),
            moment(found.recorded_at),
            body["tenant"],
            body["request_id"],
            moment(datetime.fromtimestamp(body["at_us"] / 1_000_000, UTC)),
            body["key_id"],
            body["role"],
            body["operation"],
            body["decision"],
            body["code"],
            body["status"],
            screening.get("action", ""),
            category,
            "" if not category else f"{risk / 1_000_000:.6f}",
            body.get("session", ""),
            body["client"],
            body["document_count"],
            body["image_count"],
            body["input_tokens"],
            body["image_tokens"],
            body["model"],
            body["model_digest"],
            body["query"].get("text", ""),
            body["query"].get("image", ""),
        )
    )


def _highest(screening: Mapping[str, Any]) -> tuple[int, str]:
    """The highest risk in micro-units and its category; of several modes the higher one."""
    return max(
        (
            (score, category)
            for risks in screening.get("risks", {}).values()
            for category, (score, _threshold) in risks.items()
        ),
        default=(0, ""),
    )


def _ocsf_line(found: Found) -> bytes:
    event = ocsf(found)
    # Integers, strings and ASCII keys alone: sorted keys are RFC 8785 here.
    digest = hashlib.sha256(orjson.dumps(event, option=orjson.OPT_SORT_KEYS)).hexdigest()
    event["attestation_list"][0]["fingerprint"] = {
        "algorithm_id": 3,
        "encoding_id": 1,
        "serialization_id": 2,
        "value": digest,
    }
    return orjson.dumps(event, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def ocsf(found: Found) -> dict[str, Any]:
    """The entry as an event, but for its fingerprint."""
    body = orjson.loads(found.body)
    activity = _activity(body["operation"])
    succeeded = body["decision"] == "answered"
    session = {"session": {"uid": body["session"]}} if "session" in body else {}
    return {
        "activity_id": activity,
        "activity_name": body["operation"] if activity == 99 else _ACTIVITIES[activity],
        "actor": {"user": {"uid": body["key_id"] or body["role"] or "service"}, "iam_role": body["role"]}
        | session,
        "api": {
            "operation": body["operation"],
            "request": {"uid": body["request_id"]},
            "response": {"code": body["status"], "message": body["code"]},
        },
        "attestation_list": [{"uid": str(found.id)}],
        "category_uid": 6,
        "class_uid": API_ACTIVITY,
        "metadata": {
            "event_code": body["code"],
            "log_version": str(found.schema_version),
            "logged_time": _milliseconds(found.recorded_at),
            "product": {"name": "Pericarp", "vendor_name": "Pericarp", "version": __version__},
            "profiles": ["record_integrity"],
            "tenant_uid": body["tenant"],
            "uid": str(found.id),
            "version": OCSF_VERSION,
        },
        "severity_id": 1 if succeeded else 2,
        "src_endpoint": {"uid": body["client"]} if body["client"] else {"name": "unknown"},
        "status_code": body["code"],
        "status_id": 1 if succeeded else 2,
        "time": body["at_us"] // 1000,
        "type_uid": API_ACTIVITY * 100 + activity,
        "unmapped": {"body": body, "body_sha256": hashlib.sha256(found.body).hexdigest()},
    }


_ACTIVITIES = {1: "Create", 2: "Read", 3: "Update", 4: "Delete"}
_ENDINGS = {"create": 1, "open": 1, "delete": 4, "purge": 4, "close": 4, "revoke": 4}


def _activity(operation: str) -> int:
    """By OCSF's enumeration; 99 (other) for what computes and stores nothing."""
    if operation.startswith("audit.") or operation.endswith(("_read", "_list")):
        return 2
    ending = _ENDINGS.get(operation.rpartition("_")[2])
    if ending is not None:
        return ending
    return 3 if operation.startswith("admin.") else 99


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "jsonl": Form("application/jsonl", "jsonl", _json_line),
        "csv": Form("text/csv; charset=utf-8", "csv", _csv_line, _csv_row(COLUMNS)),
        "ocsf": Form("application/jsonl", "ocsf.jsonl", _ocsf_line),
    }
)
