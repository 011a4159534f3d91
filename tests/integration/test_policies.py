"""Every version of a policy is kept with who set it and when; nobody sets one above its ceiling."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from tenants.access import INSTALLATION, Role, TenantId
from tenants.ceiling import Ceiling
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import Forbidden, InvalidPolicy, PolicyChanged, TenantNotFound
from tenants.policies import Policies, Setter
from tenants.policy import Isolation, Policy

NOBODY = TenantId(uuid.uuid4())
THEIR_ADMIN = Setter(Role.TENANT_ADMIN, "key-of-acme")
PLATFORM = Setter(Role.PLATFORM_ADMIN, "key-of-us")


@pytest.fixture
def policies(directory: Directory) -> Policies:
    return directory.policies


@pytest.fixture
async def open_again(policies: Policies) -> AsyncIterator[None]:
    """The database is shared by all tests: no ceiling may outlast its own."""
    yield
    await policies.set_ceiling(Ceiling())


async def make(directory: Directory, policy: Policy | None = None) -> TenantId:
    return (await directory.create_tenant(f"policies-{secrets.token_hex(6)}", policy)).id


async def test_every_version_is_kept_with_who_set_it_and_when(
    directory: Directory, policies: Policies
) -> None:
    tenant = await make(directory)
    await policies.set(tenant, Policy(sessions=9), by=PLATFORM)
    await policies.set(tenant, Policy(sessions=8), by=THEIR_ADMIN)
    history = await policies.history(tenant)
    assert [each.version for each in history] == [3, 2, 1]
    assert [each.policy.sessions for each in history] == [8, 9, 100]
    assert [each.set_by for each in history] == [THEIR_ADMIN, PLATFORM, Setter("operator")]
    now = datetime.now(UTC)
    assert all(now - timedelta(minutes=5) < each.set_at < now + timedelta(minutes=5) for each in history)
    assert await policies.current(tenant) == history[0]
    assert await policies.history(tenant, most=1, before=3) == history[1:2]
    assert await policies.history(tenant, before=1) == ()


async def test_an_unknown_tenant_has_no_policy(policies: Policies) -> None:
    for asked in (
        policies.current(NOBODY),
        policies.history(NOBODY),
        policies.set(NOBODY, Policy()),
        policies.bounds(NOBODY, Role.TENANT_ADMIN),
        policies.set_ceiling(Ceiling(), tenant=NOBODY),
    ):
        with pytest.raises(TenantNotFound):
            await asked


async def test_who_has_seen_another_version_changes_nothing(directory: Directory, policies: Policies) -> None:
    tenant = await make(directory)
    seen = (await policies.current(tenant)).version
    outcomes = await asyncio.gather(
        *(policies.set(tenant, Policy(sessions=count), expected=seen) for count in range(1, 6)),
        return_exceptions=True,
    )
    changed = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len(changed) == 1
    assert all(isinstance(outcome, PolicyChanged) for outcome in outcomes if outcome not in changed)
    assert await policies.current(tenant) == changed[0]


async def test_a_tenants_administrator_lowers_and_raises_again_but_never_above_what_was_granted(
    directory: Directory, policies: Policies
) -> None:
    granted = Policy(requests_per_minute=100, sessions=10, allowed_models=("a", "b"))
    tenant = await make(directory, granted)
    lower = replace(granted, requests_per_minute=50, sessions=2, allowed_models=("a",))
    await policies.set(tenant, lower, by=THEIR_ADMIN)
    await policies.set(tenant, granted, by=THEIR_ADMIN)
    above = replace(
        granted,
        requests_per_minute=101,
        token_burst=60_000_000,
        sessions=11,
        shadow=("requests",),
        isolation=Isolation.POOLED,
        group="somebody-elses",
        keep_warm=True,
        allowed_models=(),
        retention_days=1,
    )
    with pytest.raises(InvalidPolicy) as caught:
        await policies.set(tenant, above, by=THEIR_ADMIN)
    assert {fault.field for fault in caught.value.faults} == {
        *("requests_per_minute", "token_burst", "sessions", "shadow", "isolation", "group"),
        *("keep_warm", "allowed_models", "retention_days"),
    }
    assert (await policies.current(tenant)).policy == granted
    await policies.set(tenant, above, by=PLATFORM)
    await policies.set(tenant, replace(above, retention_days=400), by=PLATFORM)
    await policies.set(tenant, replace(above, retention_days=30), by=THEIR_ADMIN)


async def test_what_is_the_tenants_own_affair_its_administrator_sets_freely(
    directory: Directory, policies: Policies
) -> None:
    tenant = await make(directory)
    own = Policy.from_json(
        '{"kind": "research", "filter_mode": "lenient", "risk_thresholds": {"hate": 1},'
        ' "console_origins": ["https://a.example"]}'
    )
    assert (await policies.set(tenant, own, by=THEIR_ADMIN)).policy == own


async def test_a_tenants_ceiling_gives_its_administrator_room_and_bounds_the_platform_too(
    directory: Directory, policies: Policies
) -> None:
    tenant = await make(directory, Policy(requests_per_minute=100))
    ceiling = Ceiling(requests_per_minute=1000, isolation=(Isolation.ISOLATED, Isolation.DEDICATED))
    version, lowered = await policies.set_ceiling(ceiling, tenant=tenant, by=PLATFORM)
    assert (version.version, version.ceiling, version.set_by, lowered) == (1, ceiling, PLATFORM, ())
    assert await policies.ceiling(tenant) == version
    roomy = Policy(requests_per_minute=1000, isolation=Isolation.DEDICATED)
    await policies.set(tenant, roomy, by=THEIR_ADMIN)
    for by in (THEIR_ADMIN, PLATFORM):
        with pytest.raises(InvalidPolicy) as caught:
            await policies.set(tenant, replace(roomy, requests_per_minute=1001), by=by)
        assert "requests_per_minute" in {fault.field for fault in caught.value.faults}
    with pytest.raises(Forbidden):
        await policies.set_ceiling(Ceiling(), tenant=tenant, by=THEIR_ADMIN)
    bounds = await policies.bounds(tenant, Role.TENANT_ADMIN)
    assert (bounds.requests_per_minute, bounds.sessions) == (1000, 100)
    assert (await policies.bounds(tenant, Role.PLATFORM_ADMIN)).sessions is None


async def test_a_new_ceiling_lowers_at_once_what_is_above_it(
    directory: Directory, policies: Policies
) -> None:
    tenant = await make(directory, Policy(isolation=Isolation.DEDICATED, images_per_request=20))
    ceiling = Ceiling(images_per_minute=5, isolation=(Isolation.ISOLATED,), requests_per_month=1000)
    _, lowered = await policies.set_ceiling(ceiling, tenant=tenant, by=PLATFORM)
    assert lowered == (tenant,)
    now = await policies.current(tenant)
    assert (now.version, now.set_by.role) == (2, "ceiling")
    assert now.policy == Policy(images_per_minute=5, images_per_request=5, requests_per_month=1000)
    await policies.set_ceiling(Ceiling(), tenant=tenant, by=PLATFORM)
    assert (await policies.current(tenant)).version == 2, "lifting a ceiling raises nobody"
    await policies.set(tenant, Policy(isolation=Isolation.DEDICATED), by=THEIR_ADMIN)  # as it was granted


@pytest.mark.usefixtures("open_again")
async def test_the_installations_ceiling_holds_for_all_but_where_a_tenants_own_speaks(
    directory: Directory, policies: Policies
) -> None:
    plain, special = await make(directory), await make(directory)
    await policies.set_ceiling(Ceiling(sessions=50), tenant=special)
    _, lowered = await policies.set_ceiling(Ceiling(sessions=20, text_length=9_000), by=PLATFORM)
    assert {plain, special} <= set(lowered)
    assert (await policies.current(plain)).policy == Policy(sessions=20, text_length=9_000)
    assert (await policies.current(special)).policy == Policy(sessions=50, text_length=9_000)
    assert (await policies.ceiling(INSTALLATION)).set_by == PLATFORM
    born_below = await make(directory)
    assert (await policies.current(born_below)).policy == Policy(sessions=20, text_length=9_000)
    with pytest.raises(InvalidPolicy):
        await make(directory, Policy(sessions=21, text_length=9_000))


@pytest.mark.usefixtures("open_again")
async def test_no_policy_slips_past_a_ceiling_that_is_set_at_the_same_moment(
    directory: Directory, policies: Policies
) -> None:
    tenants = [await make(directory, Policy(sessions=10)) for _ in range(4)]
    sets = [
        policies.set(tenant, Policy(sessions=count), by=PLATFORM)
        for tenant in tenants
        for count in range(90, 93)
    ]
    outcomes = await asyncio.gather(
        *sets[:6],
        policies.set_ceiling(Ceiling(sessions=5)),
        *sets[6:],
        make(directory),
        return_exceptions=True,
    )
    assert all(not isinstance(each, BaseException) or isinstance(each, InvalidPolicy) for each in outcomes)
    made = [each for each in outcomes if isinstance(each, uuid.UUID)]
    for tenant in (*tenants, *map(TenantId, made)):
        assert (await policies.current(tenant)).policy.sessions <= 5


async def test_a_ceiling_is_nobody_elses(
    policies: Policies, directory: Directory, database: Database
) -> None:
    mine, theirs = await make(directory), await make(directory)
    await policies.set_ceiling(Ceiling(sessions=7), tenant=mine)
    assert (await policies.ceiling(theirs)).ceiling == Ceiling()
    async with database.transaction(theirs) as connection:
        assert await connection.scalar(text("select count(*) from pericarp.ceiling")) == 0
