"""A tenant that fills its share of a gateway is refused, and another one is answered, over HTTP."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.integration.served import Served, serve, until

ASK = {"query": "q", "documents": ["a", "bb"]}


@pytest.fixture(scope="module")
def service(app_url: str, installation_secrets: Any) -> Iterator[Served]:
    limits: dict[str, Any] = {
        "image_nets": False,
        "image_text": False,
        "tenant_requests": 3,
        "body_limit_bytes": 65_536,
        "tenant_body_bytes": 65_536,
    }
    with serve(app_url, *installation_secrets.keys, **limits) as served:
        yield served


def begin(service: Served, key: str, size_bytes: int) -> socket.socket:
    """A request whose body has come to its last byte but one."""
    parts = urlsplit(service.url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 0))
    body = json.dumps(ASK).encode().ljust(size_bytes)
    head = (
        f"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {size_bytes}\r\n\r\n"
    )
    connection.sendall(head.encode() + body[:-1])
    return connection


@pytest.mark.parametrize(
    ("count", "size_bytes", "reason"), [(3, 1_000, "tenant_requests"), (2, 32_700, "tenant_bodies")]
)
def test_who_holds_its_share_is_refused_and_another_answered(
    service: Served, count: int, size_bytes: int, reason: str
) -> None:
    name, key = service.search_key(concurrent_requests=9)
    _, other = service.search_key()
    with ExitStack() as held:
        waiting = [held.enter_context(begin(service, key, size_bytes)) for _ in range(count)]
        until(lambda: len(service.enforcement._running.all()) == count)
        large = {**ASK, "query": "q" * 2_000}
        refused = service.rerank(large, key)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert (refused.json()["reason"], refused.headers["Retry-After"]) == (reason, "1")
        assert service.rerank(ASK, other).status_code == 200
        for connection in waiting:
            connection.sendall(b" ")
            assert connection.recv(12) == b"HTTP/1.1 200"
    assert service.rerank(large, key).status_code == 200
    assert "failed" in {entry["decision"] for entry in service.entries(name)}
