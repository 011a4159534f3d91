"""Saved searches: filters of the log under a name, a tenant's own.

Revision 0017, after 0016. Inputs are never in them, only fingerprints.
"""

from __future__ import annotations

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

OWN_ROWS = "tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid"

STATEMENTS = (
    """
    create table pericarp.saved_search (
        tenant_id uuid not null,
        name text not null,
        filters jsonb not null,
        saved_at timestamptz not null default clock_timestamp(),
        saved_by text not null,
        constraint saved_search_pkey primary key (tenant_id, name),
        constraint saved_search_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id)
    )
    """,
    "alter table pericarp.saved_search enable row level security",
    "alter table pericarp.saved_search force row level security",
    f"create policy own_rows on pericarp.saved_search using ({OWN_ROWS}) with check ({OWN_ROWS})",
    "grant select, insert, delete on pericarp.saved_search to pericarp_app",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop table pericarp.saved_search")
