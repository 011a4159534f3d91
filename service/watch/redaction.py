"""What may stand in a log line, by type: numbers, words, and the few sentences that are of our own making.

Whatever else is passed, by mistake or by a library, is replaced by its type and its length: bytes, long strings,
objects. So a text of a caller that finds its way into a field is no longer one when it is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from structlog.typing import EventDict

    Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]

SENTENCES = frozenset(
    {
        *("event", "reason", "reasons", "where", "raised", "message", "line"),
        *("operation", "url", "model", "origin", "witness", "issuer", "evidence", "summary", "labels"),
    }
)
"""Fields whose text we make ourselves, of our words and of what an operator set: it may have blanks and slashes."""
SENTENCE_CHARS = 500
WORD = re.compile(r"[A-Za-z0-9_.:@+-]{0,80}")
"""Ids, digests, names of tenants and of errors. A longer one, or one with blanks, is no id."""
TOLD = re.compile(r"<\w+(?: \d+)?>")
"""What `told` makes: redacted once more, it stays as it is."""
ITEMS = 50
"""Of a list or an object; what comes after them is counted and not written."""
DEPTH = 3
LARGEST = 2**63

SECRETS = (
    ("prc_", re.compile(r"prc_(?:live|admin)_\w+"), "<key>"),
    ("eyJ", re.compile(r"\beyJ[\w-]+\.[\w-]+(?:\.[\w-]+)*"), "<token>"),
    ("//", re.compile(r"(?<=//)[^/@\s]+@"), "<credentials>@"),
)
"""What is secret wherever it stands: API keys, JSON Web Tokens (RFC 7519), a URL's user information (RFC 3986, 3.2.1).

Each with what it cannot be without, so that most texts need no search."""


def redact(event: EventDict) -> EventDict:
    """The line's fields, each of a type that may be written; the same object, changed."""
    for name, value in event.items():
        event[name] = plain(value, sentence=name in SENTENCES)
    return event


def plain(value: object, *, sentence: bool = False, depth: int = 0) -> Plain:
    """`value` where it may be written, else its type and length. Strings are words, or sentences of ours."""
    if isinstance(value, str):
        return _sentence(value) if sentence else _word(value)
    match value:
        case None | bool():
            return value
        case int():
            return int(value) if -LARGEST <= value < LARGEST else told(value)
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
        case UUID() | datetime():
            return value.isoformat() if isinstance(value, datetime) else str(value)
        case Mapping() if depth < DEPTH:
            kept = {
                str(_word(str(name))): plain(each, sentence=sentence, depth=depth + 1)
                for name, each in [*value.items()][:ITEMS]
            }
            return kept | ({"more": len(value) - ITEMS} if len(value) > ITEMS else {})
        case list() | tuple() if depth < DEPTH:
            listed = [plain(each, sentence=sentence, depth=depth + 1) for each in value[:ITEMS]]
            return listed + ([f"{len(value) - ITEMS} more"] if len(value) > ITEMS else [])
        case _:
            return told(value)


def told(value: object) -> str:
    """A value's type and, where its class is a container of the language, its length: `<bytes 123>`.

    No method of any other object is called: a secret keeps even its length.
    """
    if isinstance(value, str | bytes | bytearray | memoryview | list | tuple | dict | set | frozenset):
        return f"<{type(value).__name__} {len(value)}>"
    return f"<{type(value).__name__}>"


def _word(text: str) -> str:
    if WORD.fullmatch(text) is None:
        return str(text) if TOLD.fullmatch(text) else told(text)
    if any(hint in text and secret.search(text) for hint, secret, _ in SECRETS):
        return told(text)
    return str(text)


def _sentence(text: str) -> str:
    for hint, secret, instead in SECRETS:
        if hint in text:
            text = secret.sub(instead, text)
    text = " ".join(text.split())
    return text if len(text) <= SENTENCE_CHARS else f"{text[:SENTENCE_CHARS]}…"
