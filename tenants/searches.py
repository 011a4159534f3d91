"""Saved searches: filters of the log under a name. They say what to look for, and hold nothing that was found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from tenants.errors import Fault, Invalid, SearchExists, SearchNotFound
from tenants.tables import saved_search as table

if TYPE_CHECKING:
    from tenants.access import TenantId
    from tenants.database import Database

SEARCH_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
MOST_SEARCHES = 200
"""Of one tenant."""


@dataclass(frozen=True, slots=True)
class SavedSearch:
    """Filters as the API has them, under a name."""

    name: str
    filters: Mapping[str, Any]
    saved_at: datetime
    saved_by: str
    """The key's id; empty: on the command line."""


class Searches:
    """Saves, lists and deletes them. Every change is durable when it returns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, tenant: TenantId, name: str, filters: Mapping[str, Any], *, by: str) -> SavedSearch:
        """Raises `Invalid` for a name that we do not take, or one search too many; `SearchExists`."""
        if SEARCH_NAME.fullmatch(name) is None:
            raise Invalid((Fault("name", "must be 1 to 63 of a-z, 0-9 and inner hyphens"),))
        try:
            async with self._database.transaction(tenant) as connection:
                count = await connection.scalar(
                    select(func.count()).select_from(table).where(table.c.tenant_id == tenant)
                )
                if (count or 0) >= MOST_SEARCHES:
                    raise Invalid((Fault("name", f"would be one more than {MOST_SEARCHES}; delete some"),))
                row = (
                    await connection.execute(
                        insert(table)
                        .values(tenant_id=tenant, name=name, filters=dict(filters), saved_by=by)
                        .returning(table)
                    )
                ).one()
        except IntegrityError as exc:
            raise SearchExists from exc
        return _read(row)

    async def list(self, tenant: TenantId) -> tuple[SavedSearch, ...]:
        """The tenant's, by name."""
        query = select(table).where(table.c.tenant_id == tenant).order_by(table.c.name)
        async with self._database.transaction(tenant) as connection:
            return tuple(map(_read, (await connection.execute(query)).all()))

    async def find(self, tenant: TenantId, name: str) -> SavedSearch:
        """Raises `SearchNotFound`, for another tenant's as for none."""
        if SEARCH_NAME.fullmatch(name) is None:
            raise SearchNotFound
        query = select(table).where(table.c.tenant_id == tenant, table.c.name == name)
        async with self._database.transaction(tenant) as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise SearchNotFound
        return _read(row)

    async def delete(self, tenant: TenantId, name: str) -> None:
        """Raises `SearchNotFound`."""
        if SEARCH_NAME.fullmatch(name) is None:
            raise SearchNotFound
        statement = delete(table).where(table.c.tenant_id == tenant, table.c.name == name)
        async with self._database.transaction(tenant) as connection:
            deleted = await connection.scalar(statement.returning(table.c.name))
        if deleted is None:
            raise SearchNotFound


def _read(row: Any) -> SavedSearch:
    return SavedSearch(row.name, row.filters, row.saved_at, row.saved_by)
