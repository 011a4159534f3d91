"""Quotas: what a tenant has used, its concurrency slots, and the hold of each running request.

Revision 0005, after 0004. `quota` and `slot` rows are updated in place by every request: half-empty pages and
no index on what changes keep those updates HOT. `key_id` is '' for the whole tenant; rows per key may come
beside it. `hold` has no foreign key: checking it would lock the tenant's row for every request.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    create table pericarp.quota (
        tenant_id uuid not null,
        key_id text not null default '',
        requests_tat timestamptz not null default '-infinity',
        images_tat timestamptz not null default '-infinity',
        month date not null default '-infinity',
        month_requests bigint not null default 0,
        month_images bigint not null default 0,
        constraint quota_pkey primary key (tenant_id, key_id),
        constraint quota_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id)
    ) with (fillfactor = 50)
    """,
    "comment on column pericarp.quota.requests_tat is 'GCRA: theoretical arrival time'",
    """
    create table pericarp.slot (
        tenant_id uuid not null,
        n integer not null,
        expires_at timestamptz not null default '-infinity',
        token bigint not null default 0,
        constraint slot_pkey primary key (tenant_id, n),
        constraint slot_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id)
    ) with (fillfactor = 50)
    """,
    "comment on column pericarp.slot.token is 'fencing: counts who had the slot; a stale one frees nothing'",
    """
    create table pericarp.hold (
        tenant_id uuid not null,
        request_id uuid not null,
        key_id text not null,
        slot integer not null,
        token bigint not null,
        images integer not null,
        images_per_minute integer not null,
        held_at timestamptz not null,
        expires_at timestamptz not null,
        constraint hold_pkey primary key (tenant_id, request_id)
    ) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000)
    """,
    "create index hold_expires on pericarp.hold (expires_at)",
    *(
        statement
        for table in ("quota", "slot", "hold")
        for statement in (
            f"alter table pericarp.{table} enable row level security",
            f"alter table pericarp.{table} force row level security",
            f"""
            create policy own_rows on pericarp.{table}
                using (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
                with check (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
            """,
            f"grant select on pericarp.{table} to pericarp_app",
        )
    ),
    "create policy lookup on pericarp.hold for select to current_user using (true)",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop table pericarp.hold, pericarp.slot, pericarp.quota")
