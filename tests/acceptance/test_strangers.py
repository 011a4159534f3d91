"""Nothing of one tenant comes back to another, whatever is called and however: our own OpenAPI page drives it.

Two tenants live in one service. One of them, the resident, leaves marks wherever a tenant can: names, ids, texts. The
other, the stranger, then calls every operation of the page with bodies, headers and ids that Hypothesis makes up, the
resident's own among them. An id of the resident must be answered like one that never was: the same status, body,
headers and stages.
"""

from __future__ import annotations

import json
import re
import secrets
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.acceptance.service_process import Service, Tenant

ROLES = ("search", "tenant_admin", "auditor")
CALLS = 8
"""Made up for each operation and role: enough to reach each with the resident's ids, few enough for two cores."""

CLIENT = httpx.Client(timeout=120.0)
"""One for all calls: making one takes longer than most calls do."""
pytestmark = pytest.mark.timeout(1800)  # some hundred calls a role, on a machine that may be busy

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
CHANGING = (
    "x-request-id",
    "date",
    "content-length",
    "server-timing",
    "ratelimit",
    "pericarp-receipt",
    "retry-after",
)
"""Headers that differ from one answer to the next of the same caller: their names count, their values do not."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A tenant and all that could give it away."""

    tenant: Tenant
    keys: dict[str, str]
    """A key's text by its role."""
    ids: dict[str, str]
    """What a stranger might name, by kind."""
    marks: tuple[str, ...]
    """What must never come back: ids, names and texts that occur nowhere else."""


@pytest.fixture(scope="module", autouse=True)
def client_closed() -> Iterator[None]:
    yield
    CLIENT.close()


@pytest.fixture(scope="module")
def resident(service: Service) -> Resident:
    secret = f"mark{secrets.token_hex(6)}"
    tenant = service.make_tenant(f"resident-{secret}")
    made = {role: service.make_key(tenant.name, role) for role in ROLES}
    with service.client(tenant.key) as client:
        session = client.post("/v1/sessions", json={}).json()["id"]
        answer = client.post(
            "/v1/rerank",
            json={"query": f"{secret} query", "documents": [f"{secret} document"], "session_id": session},
        )
    assert answer.status_code == 200, answer.text
    ids = {
        "session": session,
        "request": answer.headers["X-Request-Id"],
        "receipt": answer.headers["Pericarp-Receipt"],
        "tenant": tenant.id,
        "name": tenant.name,
        "key": tenant.key_id,
        **{f"{role} key": key["id"] for role, key in made.items()},
    }
    return Resident(tenant, {role: key["key"] for role, key in made.items()}, ids, (secret, *ids.values()))


@pytest.fixture(scope="module")
def stranger(service: Service) -> dict[str, str]:
    """Keys of a second tenant, by role."""
    tenant = service.make_tenant(f"stranger-{secrets.token_hex(4)}")
    service.tell("tenant", "policy", tenant.name, "requests_per_minute=100000", "concurrent_requests=100")
    return {role: service.make_key(tenant.name, role)["key"] for role in ROLES}


@pytest.fixture(scope="module")
def page(service: Service) -> schemathesis.BaseSchema:
    with service.client("") as client:
        return schemathesis.openapi.from_dict(client.get("/openapi.json").json())


@pytest.fixture(scope="module")
def standing(service: Service, resident: Resident) -> Iterator[None]:
    """Whatever strangers do meanwhile, nothing of the resident changes."""

    def look() -> list[Any]:
        with service.client(resident.tenant.key) as client:
            session = client.get(f"/v1/sessions/{resident.ids['session']}").json()
        keys = service.tell("key", "list", resident.tenant.name)
        for key in keys:  # that it was used is its own holder's doing
            key.pop("last_used_at", None), key.pop("last_used_address", None)
        (tenant,) = (each for each in service.tell("tenant", "list") if each["name"] == resident.tenant.name)
        return [session, keys, tenant, service.tell("tenant", "policy", resident.tenant.name)]

    before, entries = look(), service.entries(resident.tenant.name)
    yield
    assert look() == before
    theirs = {each["request_id"] for each in service.entries(resident.tenant.name)}
    assert theirs >= {each["request_id"] for each in entries}


def operations(page: schemathesis.BaseSchema) -> list[Any]:
    listed: list[Any] = list(page.get_all_operations())
    return [each.ok() for each in listed]  # None, and so a failure, where one cannot be read


def call(service: Service, key: str, case: Any) -> httpx.Response:
    """The case as it was made up, over HTTP."""
    made = case.as_transport_kwargs(base_url=service.url, headers={"Authorization": f"Bearer {key}"})
    made = {name: value for name, value in made.items() if value is not None and name != "cookies"}
    made["headers"] = {
        name: value
        for name, value in made["headers"].items()
        if name.lower() not in ("content-length", "host")
    }
    return CLIENT.request(**made)


def told(answer: httpx.Response) -> str:
    return "\n".join([*(f"{name}: {value}" for name, value in answer.headers.items()), answer.text])


# -- whatever is asked --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("standing")
@pytest.mark.parametrize("role", ROLES)
def test_no_answer_to_a_stranger_holds_anything_of_the_resident(
    service: Service, page: schemathesis.BaseSchema, resident: Resident, stranger: dict[str, str], role: str
) -> None:
    foreign = st.sampled_from(sorted(resident.ids.values()))

    def tell(operation: Any, case: Any, draw: Any) -> None:
        for name in case.path_parameters or {}:
            case.path_parameters[name] = draw(foreign)
        if isinstance(case.body, dict) and "session_id" in case.body and draw(st.booleans()):
            case.body["session_id"] = resident.ids["session"]
        for name in case.query if isinstance(case.query, dict) else ():
            if draw(st.booleans()):
                case.query[name] = draw(foreign)
        sent = repr((case.path_parameters, case.query, case.headers, case.cookies, case.body))
        answer = call(service, stranger[role], case)
        assert answer.status_code < 500, f"{operation.label}: {answer.status_code} {answer.text}"
        for mark in resident.marks:
            assert mark in sent or mark not in told(answer), f"{operation.label}: {answer.text}"

    for operation in operations(page):
        made_up(operation, tell)


def made_up(operation: Any, tell: Callable[[Any, Any, Any], None]) -> None:
    """Make up `CALLS` calls of one operation, the same ones in every run."""

    @settings(
        max_examples=CALLS,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), data=st.data())
    def each(case: Any, data: st.DataObject) -> None:
        tell(operation, case, data.draw)

    each()


# -- ids of others --------------------------------------------------------------------------------------------------


def unknown_like(foreign: str) -> str:
    """An id of the same shape that nobody has."""
    if UUID.fullmatch(foreign):
        return str(uuid.uuid4())
    head, mark, rest = foreign.rpartition("_" if "_" in foreign else "-")
    return head + mark + "".join(secrets.choice("0123456789abcdef") for _ in rest)


def bare(answer: httpx.Response, *ids: str) -> tuple[int, dict[str, str], list[str], Any]:
    """Status, headers, stages and body, without what is each request's own."""
    text = answer.text
    for own in (*ids, answer.headers["X-Request-Id"]):
        text = text.replace(own, "…")
    headers = {
        name: "…" if name in CHANGING else value.replace(answer.headers["X-Request-Id"], "…")
        for name, value in answer.headers.items()
    }
    stages = re.findall(r"(\w+);dur=", answer.headers.get("Server-Timing", ""))
    return answer.status_code, headers, stages, json.loads(text) if text else None


@pytest.mark.usefixtures("standing")
@pytest.mark.parametrize("role", ROLES)
def test_an_id_of_another_tenant_is_answered_like_one_that_never_was(
    service: Service, page: schemathesis.BaseSchema, resident: Resident, stranger: dict[str, str], role: str
) -> None:
    named = [operation for operation in operations(page) if operation.path_parameters]
    assert named, "the page lists no path with an id in it"
    with service.client(stranger[role]) as client:
        for operation in named:
            for kind, foreign in resident.ids.items():
                answers = []
                for each in (foreign, unknown_like(foreign)):
                    path = re.sub(r"\{[^}]+\}", each, operation.path)
                    body: Any = {} if operation.method in ("post", "put", "patch") else None
                    answer = client.request(operation.method.upper(), path, json=body)
                    answers.append(bare(answer, each))
                assert answers[0] == answers[1], f"{operation.label} with a {kind}"


@pytest.mark.usefixtures("standing")
def test_a_session_of_another_tenant_in_a_body_is_answered_like_one_that_never_was(
    service: Service, resident: Resident, stranger: dict[str, str]
) -> None:
    answers = []
    for session in (resident.ids["session"], unknown_like(resident.ids["session"])):
        body = {"query": "tea", "documents": ["green tea"], "session_id": session}
        answers.append(bare(service.rerank(body, stranger["search"]), session))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
