"""What callers send is nowhere but in their answers: no log, metric, error, file or core dump has it.

A text, an image and keys are sent through every route that the application has, rightly and wrongly, while a worker
dies and while the database is gone; the log is at its most talkative.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from service.app import create_app
from service.installation import Installation
from service.settings import Settings
from tenants import embedded
from tests.acceptance.service_process import Process, Service, Tenant, until
from tests.assets.images import encode, photo, secretive_png

WORD = "canary9Vt4kText"
SENTENCE = f'{WORD} über 100% & "more"'
IMAGE = secretive_png(encode(photo(64, 64, seed=9), "PNG"))
TORN = IMAGE[:900]
UNKNOWN_KEY = "prc_live_" + "C4naryK3y000_" + "x" * 49
TRACE = "c4a12e00c4a12e00c4a12e00c4a12e00"

PICTURE = base64.b64encode(IMAGE).decode()
MODEL = "pericarp-demo"
RERANK: dict[str, Any] = {"model": MODEL, "query": SENTENCE, "documents": [SENTENCE, "another"]}
SCORE: dict[str, Any] = {"model": MODEL, "text_1": SENTENCE, "text_2": [SENTENCE, "another"]}
CONTENT: dict[str, dict[str, Any]] = {
    "rerank": RERANK,
    "score": SCORE,
    "clean": {"image": PICTURE},
    "sessions": {},
    "moderations": {
        "input": [
            {"type": "text", "text": SENTENCE},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
        ]
    },
}
"""What a route is asked rightly, by the last part of its path."""
KEYLESS = {
    "/v1/keys/leaked": [
        {"token": UNKNOWN_KEY, "type": "api_key", "url": f"https://{WORD}.example", "source": WORD}
    ]
}
WRONG: dict[str, Any] = {
    **RERANK,
    **SCORE,
    "image": base64.b64encode(TORN).decode(),
    "input": SENTENCE,
    "name": SENTENCE,
    "reason": SENTENCE,
    "model": SENTENCE,
    "session": SENTENCE,
    "filters": {"fingerprint": SENTENCE},
    "unheard": SENTENCE,
}
HEADERS = {
    "User-Agent": WORD,
    "Pericarp-End-User": WORD,
    "Idempotency-Key": "once",  # kept as it is, for a day: docs/administration.md
    "If-Match": f'"{WORD}"',
    "Cookie": f"session={WORD}",
    "X-Request-Id": WORD,
    "Referer": f"https://{WORD}.example/",
    "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01",
}


def forms(secret: bytes) -> set[bytes]:
    """How it may look: as it is, in JSON, in a URL, in Base64 at each of the three places where it may begin, in hexadecimal."""
    shapes = {secret, secret.hex().encode(), quote(secret).encode(), quote(secret, safe="").encode()}
    shapes |= {json.dumps(secret.decode()).strip('"').encode()} if secret.isascii() else set()
    for before in range(3):
        for encoded in (base64.b64encode, base64.urlsafe_b64encode):
            whole = encoded(b"\0" * before + secret)
            shapes.add(whole[-(-before * 4 // 3) : len(whole) // 4 * 4 - 4])
    return shapes


@dataclass
class Sent:
    """What was sent and what came back."""

    keys: list[str] = field(default_factory=list)
    answers: list[tuple[str, httpx.Response]] = field(default_factory=list)

    @property
    def canaries(self) -> set[bytes]:
        """No answer but a caller's own, and nothing else of the service, may hold any of these."""
        told = {form for word in (WORD, UNKNOWN_KEY) for form in forms(word.encode())}
        told |= {form for part in (IMAGE[200:248], TORN[-48:], b"secret-text") for form in forms(part)}
        return told | {form for key in self.keys for form in forms(key[9:].encode())}


def found(canaries: set[bytes], where: bytes) -> list[bytes]:
    return [canary for canary in canaries if canary in where]


@pytest.fixture(scope="module")
def routes() -> list[tuple[str, str]]:
    """Every route of the application, in the schema or not."""
    nowhere = Installation("postgresql://nobody@127.0.0.1:1/none", None, bytes(32), bytes(32), bytes(32))
    listed = iter_route_contexts(create_app(Settings(), nowhere).routes)
    return sorted((method, route.path) for route in listed for method in route.methods or () if route.path)


@pytest.fixture(scope="module")
def sent(service: Service, acme: Tenant, routes: list[tuple[str, str]]) -> Sent:
    """Everything was sent: by nobody, by a key that is none, and by keys of every role."""
    told = Sent()
    platform = service.make_key(acme.name, "platform_admin")["key"]
    with service.client(platform) as client:
        house = client.post(
            "/admin/v1/tenants", json={"name": "canary-house", "policy": {"images_per_minute": 100}}
        )
        assert house.status_code == 201, house.text
        made = [
            client.post(f"/admin/v1/tenants/{house.json()['id']}/keys", json={"role": role}).json()["key"]
            for role in ("search", "tenant_admin", "auditor")
        ]
    service.issued.extend(made)
    told.keys = [platform, *made]
    for key in ("", UNKNOWN_KEY, *told.keys):
        with service.client(key, **HEADERS) as client:
            for method, path in routes:
                for answer in send_wrongly(client, method, path):
                    told.answers.append((f"{method} {path}", answer))
    send_no_http(service)
    with service.client(made[0], **HEADERS) as client:
        for path, body in rightly(routes).items():
            answer = client.post(path, json=body)
            assert answer.is_success, (path, answer.text)
            told.answers.append((f"POST {path}", answer))
        pictured = {**RERANK, "documents": [{"text": SENTENCE, "image": PICTURE}, SENTENCE]}
        assert client.post("/v1/rerank", json=pictured).status_code == 200
        told.answers += crash_a_worker(service, client)
        told.answers += lose_the_database(service, client)
    print(len(told.answers))
    return told


def send_wrongly(client: httpx.Client, method: str, path: str) -> Iterator[httpx.Response]:
    """Canaries in the path, the query and the body, as JSON and, of who is known, as no JSON at all."""
    concrete = "".join(
        quote(SENTENCE, safe="") if part.startswith("{") else part
        for part in path.replace("{", "\0{").replace("}", "}\0").split("\0")
    )
    parameters = {"q": SENTENCE, "cursor": WORD, "limit": WORD, "since": SENTENCE}
    if method not in ("POST", "PUT", "PATCH"):
        yield client.request(method, concrete, params=parameters)
        return
    yield client.request(method, concrete, params=parameters, json=WRONG)
    if UNKNOWN_KEY not in client.headers.get("Authorization", UNKNOWN_KEY):
        yield client.request(method, concrete, content=SENTENCE.encode() + IMAGE)


def send_no_http(service: Service) -> None:
    """What the server itself refuses, and logs by itself."""
    parts = urlsplit(service.url)
    for nonsense in (f"{WORD} / HTTP/1.1", f"GET /{WORD} {WORD}", f"GET / HTTP/1.1\r\n{WORD}"):
        with socket.create_connection((parts.hostname, parts.port)) as line:
            line.sendall(f"{nonsense}\r\n\r\n".encode())
            assert b"400 Bad Request" in line.recv(4096)


def rightly(routes: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Every path that takes what a search key sends, and a body that it answers."""
    taking = [
        path
        for method, path in routes
        if method == "POST" and "/admin/" not in path and "/audit/" not in path
    ]
    return {path: CONTENT[path.rpartition("/")[2]] for path in taking if path not in KEYLESS}


def crash_a_worker(service: Service, client: httpx.Client) -> list[tuple[str, httpx.Response]]:
    """The worker ends in a way that would leave a core dump, in the middle of a request, as often as it is tried."""
    (worker,) = (each for each in service.workers() if each.name == worker_name(service, client))
    long = {**RERANK, "documents": [f"{SENTENCE} {number}" for number in range(500)]}
    used = ticks(worker)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/v1/rerank", json=long)
        until(lambda: ticks(worker) > used + 10, 30, every_s=0.01)
        os.kill(worker.pid, signal.SIGSEGV)
        answer = asked.result()
    assert answer.status_code == 200, answer.text
    assert not worker.lives
    return [("a worker dies", answer)]


def worker_name(service: Service, client: httpx.Client) -> str:
    tenant = next(each for each in service.tell("tenant", "list") if each["name"] == "canary-house")
    return "prc-w-" + str(tenant["id"]).replace("-", "")[:8]


def ticks(process: Process) -> int:
    try:
        told = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
    except FileNotFoundError:
        return 0
    return int(told[11]) + int(told[12])


def lose_the_database(service: Service, client: httpx.Client) -> list[tuple[str, httpx.Response]]:
    answers: list[tuple[str, httpx.Response]] = []

    def asked_again() -> bool:
        answers.append(("the database is gone", client.post("/v1/rerank", json=RERANK)))
        return answers[-1][1].status_code == 200

    with embedded.running(service.home) as server:
        os.kill(server.pid, signal.SIGSEGV)
        until(asked_again, 60)
        until(lambda: client.get("/readyz").status_code == 200, 30)
    assert any(answer.status_code == 503 for _, answer in answers)
    return answers


def test_no_error_and_no_header_repeats_what_was_sent(sent: Sent) -> None:
    assert len(sent.answers) > 500
    repeated = {
        (where, answer.status_code)
        for where, answer in sent.answers
        if answer.is_error and found(sent.canaries, answer.content)
    }
    assert repeated == set()
    headers = {
        (where, answer.status_code)
        for where, answer in sent.answers
        if found(sent.canaries, repr(answer.headers.raw).encode())
    }
    assert headers == set()


def test_no_log_holds_what_was_sent(service: Service, sent: Sent) -> None:
    ids = [answer.headers["X-Request-Id"] for _, answer in sent.answers]
    until(lambda: service.stderr.count('"action": "request"') >= len(ids), 30)
    written = [*(service.home / "logs").iterdir(), service.folder / "stderr", service.folder / "stdout"]
    assert {path.name for path in written} >= {"postgres.log", "stderr"}
    held = {path.name: found(sent.canaries, path.read_bytes()) for path in written}
    # What `serve --demo` prints is another key: none of those that were sent.
    assert {name: canaries for name, canaries in held.items() if canaries} == {}
    lines = [json.loads(line) for line in service.stderr.splitlines()]
    assert any(line.get("logger") == "uvicorn.error" for line in lines), "it refuses what is no HTTP"
    by_request = {line["request_id"]: line for line in lines if line["action"] == "request"}
    assert {by_request[each]["trace_id"] for each in ids} == {TRACE}


def test_no_metric_holds_what_was_sent(service: Service, sent: Sent) -> None:
    with service.client(sent.keys[0]) as client:
        exposed = client.get("/metrics")
    assert exposed.status_code == 200 and found(sent.canaries, exposed.content) == []
    assert b'operation="/v1/rerank"' in exposed.content


def test_no_file_of_the_installation_holds_what_was_sent(service: Service, sent: Sent) -> None:
    location = json.loads((service.home / "postgres" / "location").read_text())
    folders = {service.home, Path(location["cluster"])}
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 500
    plain = {
        WORD.encode(),
        IMAGE[200:248],
        PICTURE[280:340].encode(),
        *(key[22:].encode() for key in sent.keys),
    }
    held = {path.name for path in files if found(plain, path.read_bytes())}
    assert held == set()


def test_no_process_may_leave_a_core_dump(service: Service, sent: Sent) -> None:
    family = service.family()
    names = " ".join(process.command for process in family)
    for kind in (
        "service serve",
        "service.fleet.worker",
        "service.screening.child",
        "postgres_guardian",
        "postgres -D",
    ):
        assert kind in names, kind
    for process in family:
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        (core,) = (line.split() for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core[4:6] == ["0", "0"], process.command
        uid = int(Path(f"/proc/{process.pid}/status").read_text().partition("\nUid:\t")[2].split()[1])
        postgres = "postgres" in process.command
        if uid != 0 and not postgres:  # proc(5): the files of what may not be dumped belong to root
            assert Path(f"/proc/{process.pid}/environ").stat().st_uid == 0, process.command
        if postgres and Path("/proc/self/coredump_filter").exists():
            assert int(Path(f"/proc/{process.pid}/coredump_filter").read_text(), 16) == 0
    places = {Path.cwd(), service.home, Path("/"), Path("/tmp")}
    assert [path for place in places for path in place.glob("core*") if path.is_file()] == []
