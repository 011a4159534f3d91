"""The life of API keys: made, changed, rotated, revoked, reported as leaked. Every change is durable when it returns.

A key keeps its id, its limits and its usage while its secrets rotate. At most two secrets of a key are live.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import Text, cast, func, insert, literal, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from tenants import tables
from tenants.access import Role, Scope, TenantId, plane_of
from tenants.errors import (
    InvalidName,
    KeyMalformed,
    KeyNotFound,
    RotationRefused,
    TenantNotFound,
)
from tenants.key_limits import NO_LIMITS, KeyLimits
from tenants.key_rights import grant, read_networks, refuse_beyond
from tenants.key_text import (
    KEY_ID_PATTERN,
    PEPPER_BYTES,
    PEPPER_VERSION,
    SECRET_LENGTH,
    digest_secret,
    make_key,
    parse_key,
    random_base62,
    write_key,
)
from tenants.policy import Policy

if TYPE_CHECKING:
    from asyncpg import Record

    from tenants.access import Caller
    from tenants.database import Database

KEY_NAME_LENGTH = 100
MOST_OVERLAP_S = 30 * 86_400
LIVE_SECRETS = 2


@dataclass(frozen=True, slots=True)
class Key:
    """One API key, without its secret."""

    id: str
    tenant: TenantId
    role: Role
    name: str | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    revoked_reason: str | None
    """revoked, leaked, or old_form; what an incident contained may be named by others."""
    scopes: tuple[Scope, ...]
    allowed_cidrs: tuple[str, ...]
    """Where it may be used from; empty: from everywhere."""
    limits: KeyLimits
    last_used_at: datetime | None
    """Some seconds late: uses are written in batches."""
    last_used_address: str | None
    contained_at: datetime | None = None
    contained_until: datetime | None = None
    """When a gateway releases it by itself; None: somebody has to."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What to change of a key; what is None stays."""

    name: str | None = None
    expires_at: datetime | None = None
    never_expires: bool = False
    """Take an expiry away; not together with a new one."""
    scopes: frozenset[Scope] | None = None
    allowed_cidrs: tuple[str, ...] | None = None
    limits: KeyLimits | None = None


class Keys:
    """Makes and changes API keys."""

    def __init__(self, database: Database, *, pepper: bytes) -> None:
        if len(pepper) < PEPPER_BYTES:
            raise ValueError(f"the pepper must be at least {PEPPER_BYTES} bytes")
        self._database = database
        self._pepper = pepper

    async def create(
        self,
        tenant: TenantId,
        role: Role,
        *,
        name: str | None = None,
        expires_at: datetime | None = None,
        scopes: Iterable[Scope] | None = None,
        allowed_cidrs: Iterable[str] = (),
        limits: KeyLimits = NO_LIMITS,
        creator: Caller | None = None,
    ) -> tuple[Key, str]:
        """A new key and its text, told once and stored nowhere.

        Unset `scopes` are all that the role may have and the creator has; no `creator` is the platform's own
        command line. Raises `TenantNotFound`, `InvalidName`, `InvalidKeyRights`, `InvalidKeyLimits`.
        """
        _check_name(name)
        role = Role(role)
        granted = grant(role, scopes, creator)
        networks = read_networks(allowed_cidrs)
        key_id, secret, token = make_key(plane_of(role))
        try:
            async with self._database.transaction(tenant) as connection:
                limits.refuse_above(await _policy(connection, tenant))
                row = (
                    await connection.execute(
                        insert(tables.key)
                        .values(
                            tenant_id=tenant,
                            id=key_id,
                            role=role.value,
                            kind=plane_of(role).value,
                            name=name,
                            expires_at=_aware(expires_at),
                            scopes=granted,
                            allowed_cidrs=networks,
                            limits=orjson.loads(limits.to_json()),
                        )
                        .returning(tables.key)
                    )
                ).one()
                await self._add_secret(connection, tenant, key_id, secret)
        except IntegrityError as exc:
            raise TenantNotFound from exc
        return read_key(row), token

    async def list(
        self, tenant: TenantId, *, after: str | None = None, most: int | None = None
    ) -> tuple[Key, ...]:
        """The tenant's keys, oldest first, revoked and expired ones included: at most `most`, those after key `after`."""
        columns = tables.key.c
        query = (
            select(tables.key)
            .where(columns.tenant_id == tenant)
            .order_by(columns.created_at, columns.id)
            .limit(most)
        )
        if after is not None:
            edge = (
                select(columns.created_at)
                .where(columns.tenant_id == tenant, columns.id == after)
                .scalar_subquery()
            )
            query = query.where(tuple_(columns.created_at, columns.id) > tuple_(edge, after))
        async with self._database.transaction(tenant) as connection:
            rows = (await connection.execute(query)).all()
        return tuple(read_key(row) for row in rows)

    async def find(self, tenant: TenantId, key_id: str) -> Key:
        """That key of the tenant. Raises `KeyNotFound`, for another tenant's as for none."""
        async with self._database.transaction(tenant) as connection:
            return read_key(await self._read(connection, tenant, key_id))

    async def find_tenant(self, key_id: str) -> TenantId:
        """Whose key it is, for the platform's own commands. Raises `KeyNotFound`."""
        rows = await self._database.call("select tenant_id from pericarp.find_key($1)", key_id)
        if not rows:
            raise KeyNotFound
        return TenantId(rows[0]["tenant_id"])

    async def change(
        self, tenant: TenantId, key_id: str, changes: Changes, *, creator: Caller | None = None
    ) -> Key:
        """Change what `changes` sets, in force within 2 s.

        Raises `KeyNotFound`, `InvalidName`, `InvalidKeyRights`, `InvalidKeyLimits`; nothing has changed then.
        """
        _check_name(changes.name)
        async with self._database.transaction(tenant) as connection:
            row = await self._read(connection, tenant, key_id, lock=True)
            refuse_beyond(Role(row.role), frozenset(map(Scope, row.scopes)), creator)
            values: dict[str, Any] = {}
            if changes.name is not None:
                values["name"] = changes.name
            if changes.never_expires:
                values["expires_at"] = None
            elif changes.expires_at is not None:
                values["expires_at"] = _aware(changes.expires_at)
            if changes.scopes is not None:
                values["scopes"] = grant(Role(row.role), changes.scopes, creator)
            if changes.allowed_cidrs is not None:
                values["allowed_cidrs"] = read_networks(changes.allowed_cidrs)
            if changes.limits is not None:
                changes.limits.refuse_above(await _policy(connection, tenant))
                values["limits"] = orjson.loads(changes.limits.to_json())
            if values:
                row = await self._update(connection, tenant, key_id, values)
        return read_key(row)

    async def rotate(
        self,
        tenant: TenantId,
        key_id: str,
        *,
        overlap_s: float = 86_400.0,
        creator: Caller | None = None,
    ) -> tuple[Key, str, datetime | None]:
        """A new secret for the key: the key, its new text, and when the old secret ends (None: it has ended).

        The old secret stays valid for `overlap_s`. Where two are live already the rotation is refused, but
        with an overlap of 0: that ends all older ones at once. Whoever is told a key's text has its rights, so the
        `creator` must have them already. Raises `KeyNotFound`, `RotationRefused`, `InvalidKeyRights`.
        """
        if not 0 <= overlap_s <= MOST_OVERLAP_S:
            raise RotationRefused(f"The overlap must be 0 to {MOST_OVERLAP_S} seconds.")
        columns = tables.key_secret.c
        secret = random_base62(SECRET_LENGTH)
        async with self._database.transaction(tenant) as connection:
            row = await self._read(connection, tenant, key_id, lock=True)
            refuse_beyond(Role(row.role), frozenset(map(Scope, row.scopes)), creator)
            now = await connection.scalar(select(func.clock_timestamp()))
            assert isinstance(now, datetime)
            if row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now):
                raise RotationRefused("The key is revoked or expired; make a new one.")
            ours = (columns.tenant_id == tenant) & (columns.key_id == key_id)
            live = ours & (
                func.coalesce(columns.not_after, literal("infinity").cast(columns.not_after.type)) > now
            )
            ends = (
                (await connection.execute(select(columns.not_after).where(live).order_by(columns.created_at)))
                .scalars()
                .all()
            )
            if overlap_s > 0 and len(ends) >= LIVE_SECRETS:
                raise RotationRefused(
                    f"Two secrets are live; the older one ends at {ends[0]:%Y-%m-%dT%H:%M:%SZ}. "
                    "Rotate with an overlap of 0 to end both now."
                )
            old_ends_at = now + timedelta(seconds=overlap_s)
            # A secret that ends sooner already still does.
            await connection.execute(
                update(tables.key_secret)
                .where(live)
                .values(not_after=func.least(columns.not_after, old_ends_at))
            )
            await self._add_secret(connection, tenant, key_id, secret)
        token = write_key(plane_of(Role(row.role)), key_id, secret)
        return read_key(row), token, old_ends_at if overlap_s > 0 else None

    async def revoke(self, tenant: TenantId, key_id: str, *, reason: str = "revoked") -> Key:
        """Refuse the key everywhere within 2 s. Idempotent: the first time and its reason stand.

        Raises `KeyNotFound`.
        """
        columns = tables.key.c
        async with self._database.transaction(tenant) as connection:
            await self._read(connection, tenant, key_id, lock=True)
            return read_key(
                await self._update(
                    connection,
                    tenant,
                    key_id,
                    {
                        "revoked_at": func.coalesce(columns.revoked_at, func.clock_timestamp()),
                        "revoked_reason": func.coalesce(columns.revoked_reason, reason),
                    },
                )
            )

    async def prove(self, text: str) -> tuple[TenantId, str, bool] | None:
        """What a found text is: whose key, its id, and whether its secret would open the door but for address.

        None for what is no key of ours. A bare key id proves nothing, so its last part is False.
        """
        secret = None
        if KEY_ID_PATTERN.fullmatch(text):
            key_id = text
        else:
            try:
                _plane, key_id, secret = parse_key(text)
            except KeyMalformed:
                return None
        rows = await self._database.call("select * from pericarp.find_key($1)", key_id)
        if not rows:
            return None
        return TenantId(rows[0]["tenant_id"]), key_id, secret is not None and self._opens(rows, secret)

    def _opens(self, rows: Iterable[Record], secret: str) -> bool:
        given = digest_secret(self._pepper, secret)
        return any(
            hmac.compare_digest(given, row["secret_digest"])
            and row["pepper_version"] == PEPPER_VERSION
            and (row["secret_expires_in_s"] is None or row["secret_expires_in_s"] > 0)
            and (row["expires_in_s"] is None or row["expires_in_s"] > 0)
            and not row["revoked"]
            for row in rows
        )

    async def _add_secret(self, connection: Any, tenant: TenantId, key_id: str, secret: str) -> None:
        await connection.execute(
            insert(tables.key_secret).values(
                tenant_id=tenant,
                key_id=key_id,
                digest=digest_secret(self._pepper, secret),
                pepper_version=PEPPER_VERSION,
            )
        )

    async def _read(self, connection: Any, tenant: TenantId, key_id: str, *, lock: bool = False) -> Any:
        """The key's row; locked until the transaction ends where it is to be changed. Raises `KeyNotFound`."""
        columns = tables.key.c
        query = select(tables.key).where(columns.tenant_id == tenant, columns.id == key_id)
        row = (await connection.execute(query.with_for_update() if lock else query)).one_or_none()
        if row is None:
            raise KeyNotFound
        return row

    async def _update(self, connection: Any, tenant: TenantId, key_id: str, values: dict[str, Any]) -> Any:
        return (
            await connection.execute(
                update(tables.key)
                .where(tables.key.c.tenant_id == tenant, tables.key.c.id == key_id)
                .values(values)
                .returning(tables.key)
            )
        ).one()


def _check_name(name: str | None) -> None:
    if name is not None and not (0 < len(name) <= KEY_NAME_LENGTH and name.isprintable()):
        raise InvalidName(f"a key's name is 1 to {KEY_NAME_LENGTH} printable characters")


def _aware(moment: datetime | None) -> datetime | None:
    if moment is not None and moment.tzinfo is None:
        raise ValueError("expires_at needs a time zone")
    return moment


async def _policy(connection: Any, tenant: TenantId) -> Policy:
    columns = tables.policy.c
    body = await connection.scalar(
        select(cast(columns.body, Text))
        .where(columns.tenant_id == tenant)
        .order_by(columns.version.desc())
        .limit(1)
    )
    if body is None:
        raise TenantNotFound
    return Policy.from_json(body)


def read_key(row: Any) -> Key:
    return Key(
        row.id,
        TenantId(row.tenant_id),
        Role(row.role),
        row.name,
        row.created_at,
        row.expires_at,
        row.revoked_at,
        row.revoked_reason,
        tuple(map(Scope, row.scopes)),
        tuple(map(str, row.allowed_cidrs)),
        KeyLimits.from_json(orjson.dumps(row.limits)),
        row.last_used_at,
        str(row.last_used_address) if row.last_used_address is not None else None,
        row.contained_at,
        row.contained_until,
    )
