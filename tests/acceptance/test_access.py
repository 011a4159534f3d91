"""Who may call: keys made, revoked and expired, roles, and what nobody without a key gets the service to do."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import asyncpg
import httpx
import pytest
from sqlalchemy import make_url

from tenants import embedded
from tenants.key_text import checksum, make_key, parse_key
from tests.acceptance.service_process import Service, Tenant, found
from tests.conftest import BODY_LIMIT_BYTES

ASK = {"query": "q", "documents": ["a", "b"]}


@pytest.fixture(scope="module")
def watcher(service: Service, acme: Tenant) -> str:
    """A key that may read the metrics."""
    key: str = service.make_key(acme.name, "platform_admin")["key"]
    return key


@pytest.fixture(scope="module")
def auditor(service: Service, acme: Tenant) -> str:
    key: str = service.make_key(acme.name, "auditor")["key"]
    return key


@pytest.fixture(scope="module")
def expired(service: Service, acme: Tenant) -> str:
    """A key whose last day is over: days cannot be waited for, so the database is told that they passed."""
    made = service.make_key(acme.name)
    as_superuser(
        service,
        "update pericarp.key set created_at = now() - interval '2 days', expires_at = now() - interval '1 second' "
        f"where id = '{made['id']}'",
    )
    key: str = made["key"]
    return key


def as_superuser(service: Service, statement: str) -> None:
    async def execute(url: str) -> None:
        connection = await asyncpg.connect(url)
        try:
            assert await connection.execute(statement) == "UPDATE 1"
        finally:
            await connection.close()

    with embedded.running(service.home) as server:
        url = make_url(server.superuser_url).set(database="pericarp")
        asyncio.run(execute(url.render_as_string(hide_password=False)))


def unauthenticated(service: Service, watcher: str) -> int:
    """How many requests were refused before a caller was known, as the metrics tell."""
    with service.client(watcher) as client:
        text = client.get("/metrics").text
    counts = re.findall(
        r'^pericarp_unauthenticated_total\{code="unauthenticated"\} ([0-9.e+]+)$', text, re.MULTILINE
    )
    return int(float(counts[0])) if counts else 0


def check_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 401
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "Pericarp-Receipt" not in answer.headers
    told = answer.json()
    assert told.pop("request_id") == answer.headers["X-Request-Id"]
    assert told == {
        "type": "about:blank",
        "title": "Unauthorized",
        "status": 401,
        "detail": "The API key is missing or not valid.",
        "code": "unauthenticated",
    }, "one answer for every reason: nobody learns which keys exist"


def with_typo(key: str) -> str:
    """One character of the secret is another: the checksum does not fit."""
    return key[:30] + ("a" if key[30] != "a" else "b") + key[31:]


def test_who_has_no_valid_key_gets_one_answer_a_metric_and_no_entry(
    service: Service, acme: Tenant, watcher: str, expired: str
) -> None:
    wrong_secret = make_key()[2]
    headers: list[dict[str, str]] = [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": acme.key},
        {"Authorization": f"Basic {acme.key}"},
        {"Authorization": "Bearer prc_live_short"},
        {"Authorization": f"Bearer {acme.key} {acme.key}"},
        {"Authorization": "Bearer " + "x" * 8000},
        {"Authorization": "Bearer ' or 1=1 --"},
        {"Authorization": f"Bearer {with_typo(acme.key)}"},
        {"Authorization": f"Bearer {acme.key[:-1]}"},
        {"Authorization": f"Bearer {wrong_secret}"},
        {"Authorization": f"Bearer {expired}"},
        {"X-Api-Key": acme.key},
    ]
    before = unauthenticated(service, watcher)
    entries = len(service.entries(acme.name))
    with service.client("") as client:
        for given in headers:
            check_refused(client.post("/v1/rerank", json=ASK, headers=given))
            check_refused(client.get("/v1/models", headers=given))
        check_refused(client.get("/metrics"))
        check_refused(client.get("/v1/no-such-path"))
        check_refused(client.post("/v1/rerank", content=b"not JSON"))
        check_refused(client.post("/v1/rerank", content=b" " * (BODY_LIMIT_BYTES + 1)))
    assert unauthenticated(service, watcher) - before == 2 * len(headers) + 4
    assert len(service.entries(acme.name)) == entries


def test_a_key_with_another_keys_secret_is_refused(service: Service, acme: Tenant, auditor: str) -> None:
    _, secret = parse_key(auditor)
    head = f"prc_live_{acme.key_id}_{secret}"
    check_refused(service.rerank(ASK, head + checksum(head)))


def test_a_revoked_key_is_refused_from_its_next_request_on(service: Service, acme: Tenant) -> None:
    made = service.make_key(acme.name)
    with service.client(made["key"]) as client:
        assert client.post("/v1/rerank", json=ASK).status_code == 200
        done = service.run("key", "revoke", made["id"])
        assert done.returncode == 0, done.stderr
        assert made["id"] in done.stdout
        check_refused(client.post("/v1/rerank", json=ASK))  # on the connection that was let in before
    listed = {key["id"]: key for key in service.tell("key", "list", acme.name)}
    assert listed[made["id"]]["revoked_at"] is not None
    assert listed[acme.key_id]["revoked_at"] is None
    assert made["key"].split("_")[-1] not in json.dumps(list(listed.values())), "no secret is shown again"
    assert service.rerank(ASK, acme.key).status_code == 200


def test_a_key_of_another_role_may_not_rank_and_leaves_an_entry(
    service: Service, acme: Tenant, auditor: str, watcher: str
) -> None:
    answers = [service.rerank(ASK, auditor), service.rerank(ASK, watcher)]
    with service.client(acme.key) as client:
        answers.append(client.get("/metrics"))
    entries = {entry["request_id"]: entry for entry in service.entries(acme.name)}
    for answer in answers:
        assert answer.status_code == 403
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert (answer.json()["code"], answer.json()["reason"]) == ("forbidden", "role")
        entry = entries[answer.json()["request_id"]]
        assert (entry["decision"], entry["status"], entry["code"]) == ("denied", 403, "forbidden")
        assert entry["id"] == answer.headers["Pericarp-Receipt"]


def test_every_key_may_see_the_models(service: Service, auditor: str, watcher: str) -> None:
    for key in (auditor, watcher, service.key):
        with service.client(key) as client:
            assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("framing", ["Content-Length: 1000000000", "Transfer-Encoding: chunked"])
def test_who_has_no_key_is_refused_before_the_body_is_sent(service: Service, framing: str) -> None:
    status, told = converse(service, framing)
    assert (status, told["code"]) == (401, "unauthenticated")


def test_a_body_that_is_too_long_by_its_header_is_refused_before_it_is_sent(service: Service) -> None:
    status, told = converse(
        service, f"Authorization: Bearer {service.key}", f"Content-Length: {BODY_LIMIT_BYTES + 1}"
    )
    assert (status, told["code"], told["limit"]) == (413, "body_too_large", BODY_LIMIT_BYTES)


def test_a_request_that_never_sends_its_body_shuts_nobody_out(service: Service) -> None:
    with open_request(service, f"Authorization: Bearer {service.key}", "Content-Length: 1000"):
        assert service.rerank(ASK).status_code == 200


def open_request(service: Service, *headers: str) -> socket.socket:
    """A request of which only the headers are ever sent."""
    host, port = found(r"\d+\.[0-9.]+:\d+", service.url).split(":")
    line = socket.create_connection((host, int(port)), timeout=30)
    line.sendall("\r\n".join(("POST /v1/rerank HTTP/1.1", f"Host: {host}", *headers, "", "")).encode())
    return line


def converse(service: Service, *headers: str) -> tuple[int, dict[str, Any]]:
    """What comes back although the body never comes."""

    def pieces(line: socket.socket) -> Iterator[bytes]:
        while piece := line.recv(65536):
            yield piece

    heard = b""
    with open_request(service, *headers) as line:
        for piece in pieces(line):
            heard += piece
            head, _, body = heard.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            if length and len(body) >= int(length[1]):
                return int(head.split()[1]), json.loads(body)
    raise AssertionError(f"the connection was closed after {heard!r}")
