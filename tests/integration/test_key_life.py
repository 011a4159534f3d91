"""The life of a key: rotated, changed, limited, used, found on the street."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from tenants.access import ROLE_SCOPES, Access, Role, Scope, plane_of
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import (
    DatabaseUnavailable,
    InvalidKeyLimits,
    InvalidKeyRights,
    KeyMalformed,
    KeyNotFound,
    KeyUnknown,
    RotationRefused,
)
from tenants.key_limits import KeyLimits
from tenants.key_text import Plane, make_key, write_key
from tenants.keys import Changes, Keys
from tenants.policy import Policy
from tenants.uses import Uses
from tests.integration.conftest import MakeCaller


async def reason(access: Access, token: str, *, plane: Plane = Plane.DATA, address: str = "") -> str:
    with pytest.raises(KeyUnknown) as caught:
        await access.authenticate(token, plane=plane, address=address)
    return caught.value.reason


# -- rotation ---------------------------------------------------------------------------------------------------


async def test_rotation_keeps_id_limits_and_rights_and_both_secrets_open_until_the_old_one_ends(
    directory: Directory, keys: Keys, access: Access, database: Database
) -> None:
    tenant = await directory.create_tenant("rotated")
    limits = KeyLimits(requests_per_minute=7)
    key, old = await keys.create(tenant.id, Role.SEARCH, limits=limits, scopes=[Scope.RERANK])
    rotated, new, ends = await keys.rotate(tenant.id, key.id, overlap_s=3600)
    assert rotated == key
    assert ends is not None
    assert ends > datetime.now(UTC)
    assert new != old
    for token in (old, new):
        caller = await access.authenticate(token)
        assert (caller.key_id, caller.key_limits, caller.scopes) == (
            key.id,
            limits,
            frozenset({Scope.RERANK}),
        )
    async with database.transaction(tenant.id) as connection:  # an hour cannot be waited for
        await connection.execute(
            text("update pericarp.key_secret set not_after = now() where not_after is not null")
        )
    assert await reason(access, old) == "rotated"
    assert (await access.authenticate(new)).key_id == key.id


async def test_a_third_live_secret_is_refused_and_no_overlap_ends_both(
    directory: Directory, keys: Keys, access: Access
) -> None:
    tenant = await directory.create_tenant("third")
    key, first = await keys.create(tenant.id, Role.SEARCH)
    _, second, _ = await keys.rotate(tenant.id, key.id, overlap_s=3600)
    with pytest.raises(RotationRefused, match="Two secrets are live"):
        await keys.rotate(tenant.id, key.id, overlap_s=3600)
    for token in (first, second):
        await access.authenticate(token)
    _, third, ends = await keys.rotate(tenant.id, key.id, overlap_s=0)
    assert ends is None
    await access.authenticate(third)
    for token in (first, second):
        assert await reason(access, token) == "rotated"
    await keys.rotate(tenant.id, key.id, overlap_s=3600)


async def test_two_rotations_at_once_leave_two_live_secrets(
    directory: Directory, keys: Keys, database: Database
) -> None:
    tenant = await directory.create_tenant("rotated-at-once")
    key, _ = await keys.create(tenant.id, Role.SEARCH)
    done = await asyncio.gather(
        *(keys.rotate(tenant.id, key.id, overlap_s=60) for _ in range(4)), return_exceptions=True
    )
    assert sum(isinstance(each, RotationRefused) for each in done) == 3
    async with database.transaction(tenant.id) as connection:
        live = await connection.scalar(
            text(
                "select count(key_id) from pericarp.key_secret"
                " where key_id = :key and (not_after is null or not_after > clock_timestamp())"
            ),
            {"key": key.id},
        )
    assert live == 2


async def test_what_is_over_or_foreign_is_not_rotated(directory: Directory, keys: Keys) -> None:
    tenant, other = [await directory.create_tenant(f"over-{number}") for number in (1, 2)]
    key, _ = await keys.create(tenant.id, Role.SEARCH)
    with pytest.raises(KeyNotFound):
        await keys.rotate(other.id, key.id)
    with pytest.raises(RotationRefused, match="overlap"):
        await keys.rotate(tenant.id, key.id, overlap_s=31 * 86_400)
    await keys.revoke(tenant.id, key.id)
    with pytest.raises(RotationRefused, match="revoked"):
        await keys.rotate(tenant.id, key.id)


# -- kinds, scopes, addresses, limits ---------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
async def test_a_key_is_unknown_on_the_other_plane(
    directory: Directory, keys: Keys, access: Access, role: Role
) -> None:
    tenant = await directory.create_tenant(f"plane-{role.value.replace('_', '-')}")
    key, token = await keys.create(tenant.id, role)
    assert token.startswith("prc_live_" if role is Role.SEARCH else "prc_admin_")
    own = plane_of(role)
    (other,) = set(Plane) - {own}
    caller = await access.authenticate(token, plane=own)
    assert (caller.role, caller.scopes) == (role, ROLE_SCOPES[role])
    assert await reason(access, token, plane=other) == "plane"
    forged = write_key(other, key.id, token[-49:-6])
    for plane in Plane:
        assert await reason(access, forged, plane=plane) == "plane"


async def test_no_key_has_a_scope_that_its_role_cannot_have_or_its_creator_lacks(
    directory: Directory, keys: Keys, access: Access
) -> None:
    tenant = await directory.create_tenant("scopes")
    _, token = await keys.create(tenant.id, Role.TENANT_ADMIN, scopes=[Scope.KEYS, Scope.RERANK])
    admin = await access.authenticate(token, plane=Plane.ADMIN)
    key, _ = await keys.create(tenant.id, Role.SEARCH, creator=admin)
    assert key.scopes == (Scope.RERANK,)
    with pytest.raises(InvalidKeyRights, match="you cannot hand on what you lack: sessions"):
        await keys.create(tenant.id, Role.SEARCH, scopes=[Scope.RERANK, Scope.SESSIONS], creator=admin)
    with pytest.raises(InvalidKeyRights, match="you cannot hand on"):
        await keys.change(tenant.id, key.id, Changes(scopes=frozenset({Scope.USAGE})), creator=admin)
    with pytest.raises(InvalidKeyRights, match="the role search cannot have: tenants"):
        await keys.create(tenant.id, Role.SEARCH, scopes=[Scope.TENANTS])
    with pytest.raises(InvalidKeyRights, match="at least one scope"):
        await keys.create(tenant.id, Role.SEARCH, scopes=[])
    with pytest.raises(InvalidKeyRights, match="at least one scope"):
        await keys.create(tenant.id, Role.AUDITOR, creator=admin)


async def test_nobody_gets_the_text_of_a_key_that_has_more_rights_than_they(
    directory: Directory, keys: Keys, access: Access
) -> None:
    tenant = await directory.create_tenant("beyond")
    _, token = await keys.create(tenant.id, Role.TENANT_ADMIN)
    admin = await access.authenticate(token, plane=Plane.ADMIN)
    _, narrow_token = await keys.create(tenant.id, Role.TENANT_ADMIN, scopes=[Scope.KEYS, Scope.RERANK])
    narrow = await access.authenticate(narrow_token, plane=Plane.ADMIN)
    platform, _ = await keys.create(tenant.id, Role.PLATFORM_ADMIN)
    little, _ = await keys.create(tenant.id, Role.PLATFORM_ADMIN, scopes=[Scope.KEYS])
    wide, _ = await keys.create(tenant.id, Role.SEARCH)
    for creator, key in ((admin, platform), (admin, little), (narrow, wide)):
        with pytest.raises(InvalidKeyRights, match="cannot hand on"):
            await keys.rotate(tenant.id, key.id, creator=creator)
        with pytest.raises(InvalidKeyRights, match="cannot hand on"):
            await keys.change(tenant.id, key.id, Changes(name="mine"), creator=creator)
    with pytest.raises(InvalidKeyRights, match="yours cannot hand on the role platform_admin"):
        await keys.create(tenant.id, Role.PLATFORM_ADMIN, scopes=[Scope.KEYS], creator=admin)
    await keys.rotate(tenant.id, wide.id, creator=admin)
    assert (await keys.find(tenant.id, platform.id)) == platform


@pytest.mark.parametrize(
    ("allowed", "address", "let_in"),
    [
        ((), "", True),
        ((), "203.0.113.9", True),
        (("203.0.113.0/24",), "203.0.113.9", True),
        (("203.0.113.0/24",), "203.0.114.9", False),
        (("203.0.113.0/24",), "::ffff:203.0.113.9", True),
        (("203.0.113.0/24",), "", False),
        (("203.0.113.0/24",), "unix", False),
        (("203.0.113.9",), "203.0.113.9", True),
        (("2001:db8::/32", "203.0.113.0/24"), "2001:db8:1::7", True),
        (("2001:db8::/32",), "2001:db9::7", False),
        (("::/0",), "203.0.113.9", False),
        (("0.0.0.0/0",), "2001:db8::1", False),
    ],
)
async def test_an_allow_list_lets_in_its_addresses_alone(
    directory: Directory, keys: Keys, access: Access, allowed: tuple[str, ...], address: str, let_in: bool
) -> None:
    tenant = await directory.create_tenant(f"cidr-{make_key()[0].lower()}")
    key, token = await keys.create(tenant.id, Role.SEARCH, allowed_cidrs=allowed)
    if let_in:
        assert (await access.authenticate(token, address=address)).key_id == key.id
    else:
        assert await reason(access, token, address=address) == "address"


async def test_every_wrong_network_is_named(directory: Directory, keys: Keys) -> None:
    tenant = await directory.create_tenant("networks")
    with pytest.raises(InvalidKeyRights) as caught:
        await keys.create(
            tenant.id, Role.SEARCH, allowed_cidrs=["10.0.0.0/8", "10.0.0.1/8", "here", "2001:db8::/129"]
        )
    assert all(wrong in str(caught.value) for wrong in ("'10.0.0.1/8'", "'here'", "'2001:db8::/129'"))
    with pytest.raises(InvalidKeyRights, match="at most 100"):
        await keys.create(tenant.id, Role.SEARCH, allowed_cidrs=["10.0.0.0/8"] * 101)


async def test_a_keys_limits_are_never_set_above_the_tenants(
    directory: Directory, keys: Keys, access: Access
) -> None:
    tenant = await directory.create_tenant("limits", Policy(requests_per_minute=100))
    with pytest.raises(InvalidKeyLimits, match="requests_per_minute: is 101"):
        await keys.create(tenant.id, Role.SEARCH, limits=KeyLimits(requests_per_minute=101))
    key, token = await keys.create(tenant.id, Role.SEARCH)
    assert (await access.authenticate(token)).key_limits == KeyLimits()
    with pytest.raises(InvalidKeyLimits):
        await keys.change(tenant.id, key.id, Changes(limits=KeyLimits(requests_per_minute=101)))
    limits = KeyLimits(requests_per_minute=100, requests_per_month=10)
    assert (await keys.change(tenant.id, key.id, Changes(limits=limits))).limits == limits
    assert (await access.authenticate(token)).key_limits == limits


async def test_a_change_changes_what_it_sets_alone(directory: Directory, keys: Keys, access: Access) -> None:
    tenant = await directory.create_tenant("changed")
    soon = datetime.now(UTC) + timedelta(days=1)
    key, token = await keys.create(tenant.id, Role.SEARCH, name="first", expires_at=soon)
    changed = await keys.change(tenant.id, key.id, Changes(name="second", allowed_cidrs=("10.0.0.0/8",)))
    assert (changed.name, changed.allowed_cidrs) == ("second", ("10.0.0.0/8",))
    assert (changed.expires_at, changed.scopes) == (key.expires_at, key.scopes)
    assert await keys.find(tenant.id, key.id) == changed
    assert await keys.change(tenant.id, key.id, Changes()) == changed
    opened = await keys.change(tenant.id, key.id, Changes(allowed_cidrs=(), never_expires=True))
    assert (opened.allowed_cidrs, opened.expires_at) == ((), None)
    await access.authenticate(token)
    other = await directory.create_tenant("changed-other")
    for wrong in (keys.find(other.id, key.id), keys.change(other.id, key.id, Changes(name="x"))):
        with pytest.raises(KeyNotFound):
            await wrong


# -- last used --------------------------------------------------------------------------------------------------


async def test_uses_are_written_in_one_batch_and_only_forwards(
    directory: Directory, keys: Keys, database: Database
) -> None:
    first, second = [await directory.create_tenant(f"used-{number}") for number in (1, 2)]
    (one, _), (two, _), (three, _) = [
        await keys.create(tenant.id, Role.SEARCH) for tenant in (first, first, second)
    ]
    uses = Uses(database)
    uses.note(first.id, one.id, "203.0.113.1")
    uses.note(second.id, three.id, "unix socket")
    uses.note(first.id, one.id, "2001:db8::7")
    uses.note(second.id, one.id, "198.51.100.1")
    uses.note(first.id, one.id, "2001:db8::7")
    assert await uses.write() == 2
    assert await uses.write() == 0
    used = await keys.find(first.id, one.id)
    assert used.last_used_at is not None
    assert used.last_used_address == "2001:db8::7"
    assert (await keys.find(first.id, two.id)).last_used_at is None
    elsewhere = await keys.find(second.id, three.id)
    assert elsewhere.last_used_at is not None
    assert elsewhere.last_used_address is None


async def test_what_could_not_be_written_is_written_later(
    directory: Directory, keys: Keys, database: Database, app_url: str
) -> None:
    tenant = await directory.create_tenant("used-later")
    key, _ = await keys.create(tenant.id, Role.SEARCH)
    away = Database(app_url)
    uses = Uses(away)
    uses.note(tenant.id, key.id, "203.0.113.1")
    with pytest.raises(DatabaseUnavailable):
        await uses.write()
    await away.open()
    try:
        assert await uses.write() == 1
    finally:
        await away.close()
    assert (await keys.find(tenant.id, key.id)).last_used_address == "203.0.113.1"


# -- found on the street ----------------------------------------------------------------------------------------


async def test_only_a_live_secret_proves_a_leak(directory: Directory, keys: Keys) -> None:
    tenant = await directory.create_tenant("leaked")
    key, token = await keys.create(tenant.id, Role.SEARCH)
    admin, admin_token = await keys.create(tenant.id, Role.TENANT_ADMIN)
    assert await keys.prove(token) == (tenant.id, key.id, True)
    assert await keys.prove(admin_token) == (tenant.id, admin.id, True)
    assert await keys.prove(key.id) == (tenant.id, key.id, False)
    assert await keys.prove(write_key(Plane.DATA, key.id, make_key()[1])) == (tenant.id, key.id, False)
    for foreign in (make_key()[2], make_key()[0], "ghp_0123456789", "", token[:-1]):
        assert await keys.prove(foreign) is None
    _, new, _ = await keys.rotate(tenant.id, key.id, overlap_s=0)
    assert await keys.prove(token) == (tenant.id, key.id, False)
    assert await keys.prove(new) == (tenant.id, key.id, True)
    revoked = await keys.revoke(tenant.id, key.id, reason="leaked")
    assert revoked.revoked_reason == "leaked"
    assert (await keys.revoke(tenant.id, key.id)).revoked_reason == "leaked", "the first time stands"
    assert await keys.prove(new) == (tenant.id, key.id, False)


async def test_a_caller_has_what_its_key_has(make_caller: MakeCaller) -> None:
    caller = await make_caller()
    assert caller.scopes == ROLE_SCOPES[Role.SEARCH]
    assert caller.key_limits == KeyLimits()


async def test_a_key_of_another_form_is_malformed(access: Access) -> None:
    with pytest.raises(KeyMalformed):
        await access.authenticate("prc_test_" + make_key()[2].removeprefix("prc_live_"))
