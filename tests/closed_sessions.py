"""Voyage's client keeps one HTTP session a thread and never closes it; here it is given one that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import requests
import voyageai
from voyageai.api_resources import api_requestor


@contextmanager
def closed_sessions() -> Iterator[None]:
    """What the client sends inside, in this thread, goes over a session that is closed afterwards."""
    kept = api_requestor._thread_context
    with requests.Session() as session:
        voyageai.requestssession = session
        kept.__dict__.pop("session", None)
        try:
            yield
        finally:
            voyageai.requestssession = None
            kept.__dict__.pop("session", None)
