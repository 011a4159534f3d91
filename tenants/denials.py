"""Tokens and certificates that are denied although they are valid: by issuer and id, until they expire anyway."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert

from tenants.errors import InvalidName
from tenants.tables import denied_token

if TYPE_CHECKING:
    from tenants.access import TenantId
    from tenants.database import Database

NAME_LENGTH = 256
LONGEST = timedelta(days=400)


@dataclass(frozen=True, slots=True)
class Denial:
    """One denied token."""

    issuer: str
    """`jwt:` and the issuer's name in the configuration, or `mtls:` and the certificate entry's."""
    jti: str
    """The token's `jti`, or the certificate's SHA-256 in lower-case hex."""
    denied_at: datetime
    until: datetime


class Denials:
    """The deny-list of every tenant."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def deny(self, tenant: TenantId, issuer: str, jti: str, *, until: datetime | None = None) -> Denial:
        """Refuse that token everywhere within 2 s. Idempotent; the later end stands. Raises `InvalidName`.

        Unset, `until` is the longest that may be kept, 400 days.
        """
        for what, value in (("issuer", issuer), ("jti", jti)):
            if not (0 < len(value) <= NAME_LENGTH and value.isprintable()):
                raise InvalidName(f"{what} is 1 to {NAME_LENGTH} printable characters")
        latest = datetime.now(UTC) + LONGEST
        end = latest if until is None else min(until, latest)
        columns = denied_token.c
        statement = insert(denied_token).values(tenant_id=tenant, issuer=issuer, jti=jti, until=end)
        async with self._database.transaction(tenant) as connection:
            # What has expired is refused without us.
            await connection.execute(
                delete(denied_token).where(
                    columns.tenant_id == tenant, columns.until < func.clock_timestamp()
                )
            )
            row = (
                await connection.execute(
                    statement.on_conflict_do_update(
                        constraint="denied_token_pkey",
                        set_={"until": func.greatest(columns.until, statement.excluded.until)},
                    ).returning(denied_token)
                )
            ).one()
        return _denial(row)

    async def list(self, tenant: TenantId) -> tuple[Denial, ...]:
        """What the tenant denies, newest first."""
        columns = denied_token.c
        query = (
            select(denied_token)
            .where(columns.tenant_id == tenant)
            .order_by(columns.denied_at.desc(), columns.issuer, columns.jti)
        )
        async with self._database.transaction(tenant) as connection:
            return tuple(_denial(row) for row in (await connection.execute(query)).all())


def _denial(row: Any) -> Denial:
    return Denial(row.issuer, row.jti, row.denied_at, row.until)
