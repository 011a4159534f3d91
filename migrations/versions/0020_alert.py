"""Alerts: silences, what gateways tell of the alerts that fire, and an end to a key's containment.

Revision 0020, after 0019. Silences and told alerts are the installation's rows. A key that a rule contained has
`contained_until`; whichever gateway comes first releases it (`due_releases`). Where it is null somebody contained the
key, and somebody releases it.
"""

from __future__ import annotations

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

OWN_ROWS = "tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid"
TABLES = ("alert_silence", "alert_told")

STATEMENTS = (
    """
    create table pericarp.alert_silence (
        tenant_id uuid not null,
        id uuid not null default gen_random_uuid(),
        matchers text[] not null,
        created_at timestamptz not null default clock_timestamp(),
        ends_at timestamptz not null,
        created_by text not null,
        comment text not null,
        constraint alert_silence_pkey primary key (tenant_id, id),
        constraint alert_silence_matchers_check check (cardinality(matchers) > 0)
    )
    """,
    """
    create table pericarp.alert_told (
        tenant_id uuid not null,
        gateway uuid not null,
        fingerprint text not null,
        alert jsonb not null,
        told_at timestamptz not null default clock_timestamp(),
        constraint alert_told_pkey primary key (tenant_id, gateway, fingerprint)
    )
    """,
    *(
        statement
        for table in TABLES
        for statement in (
            f"alter table pericarp.{table} enable row level security",
            f"alter table pericarp.{table} force row level security",
            f"create policy own_rows on pericarp.{table} using ({OWN_ROWS}) with check ({OWN_ROWS})",
        )
    ),
    "grant select, insert on pericarp.alert_silence to pericarp_app",
    "grant update (ends_at) on pericarp.alert_silence to pericarp_app",
    "grant select, insert, delete on pericarp.alert_told to pericarp_app",
    "alter table pericarp.key add column contained_until timestamptz",
    """
    alter table pericarp.key add constraint key_contained_until_check
        check (contained_until is null or contained_at is not null)
    """,
    """
    create index key_contained_until on pericarp.key (contained_until) where contained_until is not null
    """,
    "comment on column pericarp.key.contained_until is 'null: until somebody releases it'",
    "grant update (contained_until) on pericarp.key to pericarp_app",
)

DUE_RELEASES = """
create function pericarp.due_releases(p_most integer) returns table (tenant_id uuid, key_id text)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select k.tenant_id, k.id from pericarp.key k
     where k.contained_until <= clock_timestamp() order by k.contained_until limit p_most
$$
"""


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in (*STATEMENTS, DUE_RELEASES):
        op.execute(statement)
    op.execute("revoke all on function pericarp.due_releases(integer) from public")
    op.execute("grant execute on function pericarp.due_releases(integer) to pericarp_quota")


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop function pericarp.due_releases(integer)")
    op.execute("alter table pericarp.key drop column contained_until")
    op.execute("drop table pericarp.alert_silence, pericarp.alert_told")
