"""Usage: what is used at the moment (levels, slots), who holds it (gateways), and what was used by day and key.

Revision 0009, after 0008. A slot's row is the hold itself: taken, settled, counted, taken again, always in place, so
that no number of requests makes the tables grow. `quota` keeps levels, not times: a level is in sixty-millionths of a
unit, so that a rate of n a minute takes n of them off in each microsecond, exactly. `gateway` has nothing of any
tenant; nobody but the functions reaches it.
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

BEFORE = (
    "hold(uuid, text, uuid, integer, integer, integer, integer, integer, integer, integer)",
    "settle(uuid, uuid, integer, integer, bytea)",
    "release(uuid, uuid)",
    "expired_holds(integer)",
    "close_orphan(uuid, uuid, integer, bytea)",
    "let_go(pericarp.hold, integer)",
)

STATEMENTS = (
    *(f"drop function pericarp.{signature}" for signature in BEFORE),
    "drop table pericarp.hold, pericarp.slot",
    """
    alter table pericarp.quota
        drop column requests_tat, drop column images_tat, drop column month_images,
        add column leaked_us bigint not null default 0,
        add column requests_level bigint not null default 0,
        add column images_level bigint not null default 0,
        add column tokens_level bigint not null default 0,
        add column requests_rate bigint,
        add column images_rate bigint,
        add column tokens_rate bigint,
        add column month_tokens bigint not null default 0
    """,
    "comment on column pericarp.quota.leaked_us is 'the moment of the levels, microseconds since 1970'",
    """
    create table pericarp.gateway (
        id uuid not null,
        lease_until timestamptz not null,
        constraint gateway_pkey primary key (id)
    ) with (fillfactor = 50)
    """,
    """
    create table pericarp.slot (
        tenant_id uuid not null,
        n integer not null,
        token bigint not null default 0,
        request_id uuid,
        key_id text not null default '',
        gateway_id uuid,
        images integer not null default 0,
        tokens bigint not null default 0,
        shadowed integer[] not null default '{}',
        expires_at timestamptz not null default '-infinity',
        settled_at timestamptz,
        used_images integer not null default 0,
        used_tokens bigint not null default 0,
        constraint slot_pkey primary key (tenant_id, n),
        constraint slot_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id)
    ) with (fillfactor = 50)
    """,
    "comment on column pericarp.slot.token is 'fencing: counts who had the slot; a stale one frees nothing'",
    "comment on column pericarp.slot.request_id is 'null: free'",
    "comment on column pericarp.slot.settled_at is 'not null: ended, and not yet counted'",
    """
    create table pericarp.usage (
        tenant_id uuid not null,
        day date not null,
        key_id text not null,
        requests bigint not null default 0,
        images bigint not null default 0,
        tokens bigint not null default 0,
        refused bigint not null default 0,
        shadowed bigint not null default 0,
        constraint usage_pkey primary key (tenant_id, day, key_id),
        constraint usage_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id)
    ) with (fillfactor = 50)
    """,
    "comment on column pericarp.usage.day is 'UTC'",
    *(
        statement
        for table in ("slot", "usage")
        for statement in (
            f"alter table pericarp.{table} enable row level security",
            f"alter table pericarp.{table} force row level security",
            f"""
            create policy own_rows on pericarp.{table}
                using (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
                with check (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
            """,
            f"create policy lookup on pericarp.{table} for select to current_user using (true)",
            f"grant select on pericarp.{table} to pericarp_app",
        )
    ),
    "create policy ageing on pericarp.usage for delete to current_user using (day < current_date)",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop table pericarp.usage, pericarp.slot, pericarp.gateway, pericarp.quota")
    script = op.get_context().opts["script"]
    for earlier in ("0005", "0006"):  # what these made, with its levels lost: nobody is charged twice
        script.get_revision(earlier).module.upgrade()
