"""Tenants, and the functions that look one up before any tenant is bound.

Revision 0001. The runtime role sees only the row of the bound tenant; the definer functions see all of them
by the owner's own SELECT policy and return no secrets.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    create table pericarp.tenant (
        id uuid not null,
        name text not null,
        created_at timestamptz not null default clock_timestamp(),
        suspended_at timestamptz,
        audit_key bytea,
        constraint tenant_pkey primary key (id),
        constraint tenant_name_key unique (name)
    )
    """,
    "comment on column pericarp.tenant.audit_key is 'wrapped under the master key; null once destroyed'",
    "alter table pericarp.tenant enable row level security",
    "alter table pericarp.tenant force row level security",
    """
    create policy own_rows on pericarp.tenant
        using (id = nullif(current_setting('app.tenant_id', true), '')::uuid)
        with check (id = nullif(current_setting('app.tenant_id', true), '')::uuid)
    """,
    "create policy lookup on pericarp.tenant for select to current_user using (true)",
    """
    create function pericarp.find_tenant(p_name text)
    returns table (id uuid, name text, created_at timestamptz, suspended_at timestamptz)
    language sql stable security definer set search_path = pg_catalog, pg_temp
    as $$ select t.id, t.name, t.created_at, t.suspended_at from pericarp.tenant t where t.name = p_name $$
    """,
    """
    create function pericarp.list_tenants()
    returns table (id uuid, name text, created_at timestamptz, suspended_at timestamptz)
    language sql stable security definer set search_path = pg_catalog, pg_temp
    as $$ select t.id, t.name, t.created_at, t.suspended_at from pericarp.tenant t order by t.name $$
    """,
    "revoke all on function pericarp.find_tenant(text), pericarp.list_tenants() from public",
    "grant execute on function pericarp.find_tenant(text), pericarp.list_tenants() to pericarp_app",
    "grant usage on schema pericarp to pericarp_app, pericarp_quota",
    "grant select on pericarp.alembic_version to pericarp_app",
    "grant select, insert, update (suspended_at, audit_key) on pericarp.tenant to pericarp_app",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop function pericarp.list_tenants(), pericarp.find_tenant(text)")
    op.execute("drop table pericarp.tenant")
