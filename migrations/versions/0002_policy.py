"""Policies: every version of a tenant's limits and rights; the highest is in force.

Revision 0002, after 0001. Rows are added, never changed.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    create table pericarp.policy (
        tenant_id uuid not null,
        version integer not null,
        created_at timestamptz not null default clock_timestamp(),
        body jsonb not null,
        constraint policy_pkey primary key (tenant_id, version),
        constraint policy_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id),
        constraint policy_version_check check (version > 0)
    )
    """,
    "alter table pericarp.policy enable row level security",
    "alter table pericarp.policy force row level security",
    """
    create policy own_rows on pericarp.policy
        using (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
        with check (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
    """,
    "create policy lookup on pericarp.policy for select to current_user using (true)",
    "grant select, insert on pericarp.policy to pericarp_app",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop table pericarp.policy")
