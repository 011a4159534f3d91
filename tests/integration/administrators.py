"""What the administrators' acceptance tests share: a platform administrator, a tenant with its own, and a search key."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import httpx

from tests.integration.served import Served

ASK = {"query": "q", "documents": ["a", "b"]}
UNKNOWN = "11111111-2222-4333-8444-555555555555"


@dataclass(frozen=True, slots=True)
class House:
    """A tenant with an administrator and a search key of its own."""

    name: str
    id: str
    admin: str
    search: str
    search_id: str

    @property
    def path(self) -> str:
        return f"/admin/v1/tenants/{self.id}"


def build_house(service: Served, platform: httpx.Client, **policy: object) -> House:
    """A new tenant, made over HTTP."""
    name = f"house-{secrets.token_hex(4)}"
    made = platform.post("/admin/v1/tenants", json={"name": name, "policy": policy})
    assert made.status_code == 201, made.text
    tenant_id = made.json()["id"]
    keys = [make_key(platform, tenant_id, role=role) for role in ("tenant_admin", "search")]
    service.issued.extend(key["key"] for key in keys)
    return House(name, tenant_id, keys[0]["key"], keys[1]["key"], keys[1]["id"])


def make_key(client: httpx.Client, tenant_id: str, **fields: object) -> dict[str, Any]:
    answer = client.post(f"/admin/v1/tenants/{tenant_id}/keys", json=fields)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """A refusal's body, once its form is checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    told: dict[str, Any] = answer.json()
    assert (told["status"], told["code"]) == (status, code), told
    assert told["request_id"] == answer.headers["X-Request-Id"]
    return told


def faults(told: dict[str, Any]) -> dict[str, str]:
    """Each wrong field, and why."""
    return {fault["field"]: fault["detail"] for fault in told["errors"]}


def without_ids(answer: httpx.Response) -> tuple[object, ...]:
    """All that an answer says but for what is new each time: two that look alike here cannot be told apart."""
    told = {name: value for name, value in answer.json().items() if name != "request_id"}
    names = sorted(set(answer.headers) - {"x-request-id", "pericarp-receipt", "date", "content-length"})
    return answer.status_code, told, names
