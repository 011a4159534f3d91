"""Entries of the log: an append-only inbox that holds each entry's bytes as they were hashed.

Revision 0004, after 0003. At most one entry per request, beside one that says its hold was orphaned. No
foreign key to tenant: the log outlives what it tells of. The trigger deters; the evidence will be checkpoints
outside.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    create table pericarp.audit_inbox (
        tenant_id uuid not null,
        id uuid not null default gen_random_uuid(),
        request_id uuid not null,
        orphan boolean not null default false,
        recorded_at timestamptz not null default clock_timestamp(),
        schema_version integer not null,
        body bytea not null,
        constraint audit_inbox_pkey primary key (tenant_id, id),
        constraint audit_inbox_request_key unique (tenant_id, request_id, orphan),
        constraint audit_inbox_body_check check (octet_length(body) between 2 and 1048576)
    )
    """,
    "create index audit_inbox_recorded on pericarp.audit_inbox (tenant_id, recorded_at, id)",
    "alter table pericarp.audit_inbox enable row level security",
    "alter table pericarp.audit_inbox force row level security",
    """
    create policy own_rows on pericarp.audit_inbox
        using (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
        with check (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
    """,
    """
    create function pericarp.refuse_change() returns trigger
    language plpgsql set search_path = pg_catalog, pg_temp
    as $$ begin raise exception 'entries of the log are never changed' using errcode = '42501'; end $$
    """,
    """
    create trigger audit_inbox_append_only before update or delete or truncate on pericarp.audit_inbox
        for each statement execute function pericarp.refuse_change()
    """,
    "alter table pericarp.audit_inbox enable always trigger audit_inbox_append_only",
    # Durable although the connection's synchronous_commit is off: set_config reaches to the end of the
    # transaction, which a SET clause of the function would not.
    """
    create function pericarp.append_entry(
        p_tenant uuid, p_request uuid, p_schema_version integer, p_body bytea
    ) returns uuid
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
    as $$
    declare
        v_id uuid;
    begin
        perform set_config('app.tenant_id', p_tenant::text, true);
        perform set_config('synchronous_commit', 'on', true);
        insert into pericarp.audit_inbox (tenant_id, request_id, schema_version, body)
        values (p_tenant, p_request, p_schema_version, p_body)
        on conflict (tenant_id, request_id, orphan) do nothing
        returning id into v_id;
        if v_id is null then
            select i.id into strict v_id from pericarp.audit_inbox i
             where i.tenant_id = p_tenant and i.request_id = p_request and not i.orphan;
        end if;
        return v_id;
    end $$
    """,
    "revoke all on function pericarp.refuse_change() from public",
    "revoke all on function pericarp.append_entry(uuid, uuid, integer, bytea) from public",
    "grant execute on function pericarp.append_entry(uuid, uuid, integer, bytea) to pericarp_quota",
    "grant select, insert on pericarp.audit_inbox to pericarp_app",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop function pericarp.append_entry(uuid, uuid, integer, bytea)")
    op.execute("drop table pericarp.audit_inbox")
    op.execute("drop function pericarp.refuse_change()")
