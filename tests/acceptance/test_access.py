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
from tenants.key_text import Plane, make_key, parse_key, write_key
from tests.acceptance.service_process import Service, Tenant, found, until
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


def as_superuser(service: Service, statement: str, done: str = "UPDATE 1") -> None:
    async def execute(url: str) -> None:
        connection = await asyncpg.connect(url)
        try:
            assert await connection.execute(statement) == done
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
    service: Service, acme: Tenant, watcher: str
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


def refusals(service: Service, tenant: Tenant, key_id: str) -> list[dict[str, Any]]:
    """Entries about refusals of that key; they are written a moment after the answer."""
    return [
        entry
        for entry in service.entries(tenant.name)
        if entry["key_id"] == key_id and entry["decision"] == "denied"
    ]


def test_a_known_key_that_is_refused_gets_the_same_answer_and_an_entry(
    service: Service, acme: Tenant, auditor: str, watcher: str, expired: str
) -> None:
    made = service.make_key(acme.name)
    _, _, secret = parse_key(auditor)
    forged = write_key(Plane.DATA, made["id"], secret)
    other_plane = write_key(Plane.ADMIN, made["id"], parse_key(made["key"])[2])
    check_refused(service.rerank(ASK, forged))
    check_refused(service.rerank(ASK, other_plane))
    check_refused(service.rerank(ASK, expired))
    check_refused(service.rerank(ASK, auditor))
    check_refused(service.rerank(ASK, watcher))
    with service.client(made["key"]) as client:
        check_refused(client.get("/metrics"))
        check_refused(client.get("/admin/v1/tenants"))
        check_refused(client.get("/admin/no-such-path"))
    with service.client(auditor) as client:
        check_refused(client.get("/v1/models"))
    expected = {
        made["id"]: ["wrong_secret", "plane", "plane", "plane", "plane"],
        parse_key(expired)[1]: ["expired"],
        parse_key(auditor)[1]: ["plane", "plane"],
        parse_key(watcher)[1]: ["plane"],
    }
    for key_id, codes in expected.items():
        until(lambda key_id=key_id, codes=codes: len(refusals(service, acme, key_id)) >= len(codes), 60)  # type: ignore[misc]
        entries = refusals(service, acme, key_id)[::-1]
        assert [entry["code"] for entry in entries] == codes
        assert {(entry["status"], entry["role"]) for entry in entries} == {(401, "")}


def test_a_flood_of_refusals_is_no_flood_of_entries(service: Service, acme: Tenant, auditor: str) -> None:
    made = service.make_key(acme.name)
    forged = write_key(Plane.DATA, made["id"], parse_key(auditor)[2])
    with service.client(forged) as client:
        for _ in range(30):
            check_refused(client.get("/v1/models"))
    until(lambda: len(refusals(service, acme, made["id"])) >= 10, 60)
    assert len(refusals(service, acme, made["id"])) <= 20, "ten a minute, and the thirty took no two minutes"


def test_a_revoked_key_is_refused_within_two_seconds(service: Service, acme: Tenant) -> None:
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


def test_a_key_does_what_its_scopes_say(service: Service, acme: Tenant) -> None:
    made = service.make_key(acme.name, "search", "--scope", "sessions")
    with service.client(made["key"]) as client:
        answer = client.post("/v1/rerank", json=ASK)
        assert client.get("/v1/sessions").status_code == 200
    assert (answer.status_code, answer.json()["code"], answer.json()["reason"]) == (403, "forbidden", "scope")
    (entry,) = (
        each for each in service.entries(acme.name) if each["request_id"] == answer.json()["request_id"]
    )
    assert (entry["decision"], entry["status"], entry["code"]) == ("denied", 403, "forbidden")
    assert entry["id"] == answer.headers["Pericarp-Receipt"]


def test_a_key_opens_from_its_addresses_alone_and_no_header_changes_them(
    service: Service, acme: Tenant
) -> None:
    near = service.make_key(acme.name, "search", "--allow", "127.0.0.0/8", "--allow", "::1")
    far = service.make_key(acme.name, "search", "--allow", "203.0.113.0/24")
    assert service.rerank(ASK, near["key"]).status_code == 200
    check_refused(service.rerank(ASK, far["key"]))
    with service.client(far["key"], **{"X-Forwarded-For": "203.0.113.7"}) as client:
        check_refused(client.post("/v1/rerank", json=ASK))
    listed = {key["id"]: key for key in service.tell("key", "list", acme.name)}
    assert listed[far["id"]]["allowed_cidrs"] == ["203.0.113.0/24"]


def test_a_rotated_key_keeps_its_id_and_both_texts_open(service: Service, acme: Tenant) -> None:
    made = service.make_key(acme.name)
    rotated = service.tell("key", "rotate", made["id"], "--overlap-hours", "1")
    service.issued.append(rotated["key"])
    assert rotated["id"] == made["id"]
    assert rotated["old_ends_at"] is not None
    for text in (made["key"], rotated["key"]):
        assert service.rerank(ASK, text).status_code == 200
    refused = service.run("key", "rotate", made["id"])
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "Two secrets are live" in refused.stderr
    last = service.tell("key", "rotate", made["id"], "--overlap-hours", "0")
    service.issued.append(last["key"])
    for text in (made["key"], rotated["key"]):
        check_refused(service.rerank(ASK, text))
    assert service.rerank(ASK, last["key"]).status_code == 200


def test_every_search_key_may_see_the_models(service: Service) -> None:
    with service.client(service.key) as client:
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
