"""Reports of keys that were found, and refusals that become entries."""

from __future__ import annotations

import time

import pytest

from service.asks import Exchange
from service.leaks import Leaks
from service.refusals import MOST_A_MINUTE, WINDOW_S, Refusals
from tenants.access import Access, Role
from tenants.audit import Audit, Entry, decode
from tenants.database import Database
from tenants.denials import Denials
from tenants.directory import Directory
from tenants.errors import KeyUnknown, TenantSuspended
from tenants.key_text import Plane, make_key, write_key
from tenants.keys import Keys


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def refusals(audit: Audit, clock: Clock) -> Refusals:
    return Refusals(audit, clock=clock)


@pytest.fixture
def leaks(database: Database, keys: Keys, audit: Audit, refusals: Refusals) -> Leaks:
    return Leaks(database=database, keys=keys, audit=audit, refusals=refusals)


def exchange(number: int = 0) -> Exchange:
    return Exchange(
        f"00000000-0000-4000-8000-{time.time_ns() % 10**11 + number:012d}",
        "203.0.113.9",
        "POST /v1/keys/leaked",
    )


async def entries(audit: Audit, tenant: object) -> list[Entry]:
    return [decode(each.body) for each in await audit.list_entries(tenant)][::-1]  # type: ignore[arg-type]


async def test_a_live_key_is_revoked_and_the_log_says_so(
    directory: Directory, keys: Keys, access: Access, audit: Audit, leaks: Leaks
) -> None:
    tenant = await directory.create_tenant("leak-live")
    (key, token), (admin, admin_token), (_, kept) = [
        await keys.create(tenant.id, role) for role in (Role.SEARCH, Role.AUDITOR, Role.SEARCH)
    ]
    for _ in range(2):
        await leaks.report(exchange(), [token, make_key()[2], admin_token, token, "ghp_something"])
    for text in (token, admin_token):
        with pytest.raises(KeyUnknown):
            await access.authenticate(text)
    await access.authenticate(kept)
    assert [(entry.operation, entry.code, entry.key_id) for entry in await entries(audit, tenant.id)] == [
        ("key.leaked", "leaked", key.id),
        ("key.leaked", "leaked", admin.id),
    ]
    assert (await keys.find(tenant.id, key.id)).revoked_reason == "leaked"


async def test_an_id_or_a_wrong_secret_revokes_nothing_and_is_noted(
    directory: Directory, keys: Keys, access: Access, audit: Audit, leaks: Leaks, refusals: Refusals
) -> None:
    tenant = await directory.create_tenant("leak-id")
    key, token = await keys.create(tenant.id, Role.SEARCH)
    await leaks.report(exchange(), [key.id, write_key(Plane.DATA, key.id, make_key()[1])])
    await access.authenticate(token)
    assert await entries(audit, tenant.id) == [], "what is noted is written beside the requests"
    await refusals.write_waiting()
    assert [(entry.code, entry.key_id) for entry in await entries(audit, tenant.id)] == [("reported", key.id)]


async def test_refusals_beyond_so_many_a_minute_are_counted_in_one_entry(
    directory: Directory, keys: Keys, audit: Audit, refusals: Refusals, clock: Clock
) -> None:
    tenant = await directory.create_tenant("flood")
    key, _ = await keys.create(tenant.id, Role.SEARCH)
    quiet, _ = await keys.create(tenant.id, Role.SEARCH)
    for number in range(MOST_A_MINUTE + 7):
        refusals.note(
            KeyUnknown(reason="wrong_secret", tenant=tenant.id, key_id=key.id), exchange(number), status=401
        )
    refusals.note(TenantSuspended(tenant=tenant.id, key_id=quiet.id), exchange(99), status=403)
    refusals.note(KeyUnknown(reason="unknown"), exchange(100), status=401)
    await refusals.write_waiting()
    assert len(await entries(audit, tenant.id)) == MOST_A_MINUTE + 1
    clock.now += WINDOW_S - 1
    refusals.sum_up()
    await refusals.write_waiting()
    assert len(await entries(audit, tenant.id)) == MOST_A_MINUTE + 1
    clock.now += 1
    refusals.sum_up()
    refusals.note(KeyUnknown(reason="revoked", tenant=tenant.id, key_id=key.id), exchange(101), status=401)
    await refusals.write_waiting()
    written = await entries(audit, tenant.id)
    assert [(entry.code, dict(entry.details)) for entry in written[-2:]] == [
        ("wrong_secret", {"repeated": 7}),
        ("revoked", {}),
    ]
    assert {entry.client for entry in written if entry.key_id == key.id} == {
        (await audit.fingerprints(tenant.id)).address("203.0.113.9")
    }
    assert [entry.code for entry in written if entry.key_id == quiet.id] == ["suspended"]


async def test_a_denial_is_listed_and_the_later_end_stands(directory: Directory, denials: Denials) -> None:
    tenant, other = [await directory.create_tenant(f"denials-{number}") for number in (1, 2)]
    first = await denials.deny(tenant.id, "jwt:corp", "token-1")
    again = await denials.deny(tenant.id, "jwt:corp", "token-1", until=first.denied_at)
    assert (again.until, again.denied_at) == (first.until, first.denied_at)
    assert await denials.list(tenant.id) == (again,)
    assert await denials.list(other.id) == ()
