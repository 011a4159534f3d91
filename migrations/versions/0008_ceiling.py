"""Ceilings, and who set which version of a policy.

Revision 0008, after 0007. Rows of both tables are added, never changed. The ceiling of the whole installation stands
under the nil UUID, which is no tenant's: row security holds for it as for any other.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    alter table pericarp.policy
        add column set_by text not null default '',
        add column set_role text not null default 'operator'
    """,
    """
    create table pericarp.ceiling (
        tenant_id uuid not null,
        version integer not null,
        created_at timestamptz not null default clock_timestamp(),
        set_by text not null,
        set_role text not null,
        body jsonb not null,
        constraint ceiling_pkey primary key (tenant_id, version),
        constraint ceiling_version_check check (version > 0)
    )
    """,
    "alter table pericarp.ceiling enable row level security",
    "alter table pericarp.ceiling force row level security",
    """
    create policy own_rows on pericarp.ceiling
        using (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
        with check (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
    """,
    "grant select, insert on pericarp.ceiling to pericarp_app",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop table pericarp.ceiling")
    op.execute("alter table pericarp.policy drop column set_by, drop column set_role")
