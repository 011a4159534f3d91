"""Sessions: what a tenant has open, and the functions that open, use, close and expire one.

Revision 0007, after 0006. A row is an open session: whatever ends it deletes it, and the log tells that it was.
`use_session` is on the hot path: one statement, durable later. The owner's own SELECT policy lets the two
functions that serve every tenant at once see all rows; `gone_sessions` answers only about what it was asked.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLE = (
    """
    create table pericarp.session (
        tenant_id uuid not null,
        id text not null,
        key_id text not null,
        created_at timestamptz not null default clock_timestamp(),
        ttl_s integer not null,
        expires_at timestamptz not null,
        ends_at timestamptz not null,
        last_used_at timestamptz,
        requests bigint not null default 0,
        constraint session_pkey primary key (tenant_id, id),
        constraint session_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id),
        constraint session_id_check check (id ~ '^ses_[0-9A-Za-z]{22}$'),
        constraint session_ttl_check check (ttl_s > 0)
    ) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000)
    """,
    "comment on column pericarp.session.expires_at is 'moves with every use, never beyond ends_at'",
    "create index session_expires on pericarp.session (expires_at)",
    "alter table pericarp.session enable row level security",
    "alter table pericarp.session force row level security",
    """
    create policy own_rows on pericarp.session
        using (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
        with check (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
    """,
    "create policy lookup on pericarp.session for select to current_user using (true)",
    "grant select on pericarp.session to pericarp_app",
)

OPEN_SESSION = """
create function pericarp.open_session(
    p_tenant uuid, p_id text, p_key_id text, p_ttl_s integer, p_longest_s integer, p_most integer,
    p_request uuid, p_schema_version integer, p_body bytea,
    out opened boolean, out retry_after_ms bigint, out receipt uuid,
    out created_at timestamptz, out expires_at timestamptz, out ends_at timestamptz
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz;
    v_open bigint;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    -- The tenant's row is the lock: of two that open the last session at once, one is refused.
    perform from pericarp.tenant t where t.id = p_tenant for no key update;
    v_now := clock_timestamp();

    -- What has expired counts until its end is in the log: so many rows a tenant has, and never more. The same
    -- session again, because the first answer was lost, counts once.
    select count(*) into v_open from pericarp.session s where s.tenant_id = p_tenant and s.id <> p_id;
    if v_open >= p_most then
        -- Unused ones end by themselves; so many have to until one more fits.
        opened := false;
        retry_after_ms := (
            select ceil(extract(epoch from s.expires_at - v_now) * 1000)::bigint from pericarp.session s
             where s.tenant_id = p_tenant and s.id <> p_id order by s.expires_at offset v_open - p_most limit 1);
        return;
    end if;
    insert into pericarp.session (tenant_id, id, key_id, created_at, ttl_s, expires_at, ends_at)
    values (p_tenant, p_id, p_key_id, v_now, p_ttl_s,
            v_now + make_interval(secs => least(p_ttl_s, p_longest_s)),
            v_now + make_interval(secs => p_longest_s))
    on conflict (tenant_id, id) do nothing;
    opened := true;
    receipt := pericarp.append_entry(p_tenant, p_request, p_schema_version, p_body);
    select s.created_at, s.expires_at, s.ends_at into strict created_at, expires_at, ends_at
      from pericarp.session s where s.tenant_id = p_tenant and s.id = p_id;
end $$
"""

USE_SESSION = """
create function pericarp.use_session(p_tenant uuid, p_id text) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_left interval;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    update pericarp.session s
       set requests = s.requests + 1,
           last_used_at = clock.now,
           expires_at = least(clock.now + make_interval(secs => s.ttl_s), s.ends_at)
      from (select clock_timestamp() as now) clock
     where s.tenant_id = p_tenant and s.id = p_id and s.expires_at > clock.now
    returning s.expires_at - clock.now into v_left;
    return floor(extract(epoch from v_left) * 1000)::bigint;  -- null where there is no such session
end $$
"""

CLOSE_SESSION = """
create function pericarp.close_session(
    p_tenant uuid, p_id text, p_request uuid, p_schema_version integer, p_body bytea
) returns uuid
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    delete from pericarp.session s
     where s.tenant_id = p_tenant and s.id = p_id and s.expires_at > clock_timestamp();
    if found then
        return pericarp.append_entry(p_tenant, p_request, p_schema_version, p_body);
    end if;
    -- The same request again, because the first answer was lost: it has its entry already. Else null.
    return (select i.id from pericarp.audit_inbox i
             where i.tenant_id = p_tenant and i.request_id = p_request and not i.orphan);
end $$
"""

EXPIRED_SESSIONS = """
create function pericarp.expired_sessions(p_most integer)
returns table (tenant_id uuid, id text, key_id text)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select s.tenant_id, s.id, s.key_id from pericarp.session s
     where s.expires_at <= clock_timestamp() order by s.expires_at limit p_most
$$
"""

CLOSE_EXPIRED_SESSION = """
create function pericarp.close_expired_session(
    p_tenant uuid, p_id text, p_request uuid, p_schema_version integer, p_body bytea
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    delete from pericarp.session s
     where s.tenant_id = p_tenant and s.id = p_id and s.expires_at <= clock_timestamp();
    if not found then
        return false;  -- another gateway was first
    end if;
    perform pericarp.append_entry(p_tenant, p_request, p_schema_version, p_body);
    return true;
end $$
"""

GONE_SESSIONS = """
create function pericarp.gone_sessions(p_tenants uuid[], p_ids text[]) returns table (place bigint)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select asked.place from unnest(p_tenants, p_ids) with ordinality asked (tenant_id, id, place)
     where not exists (
           select from pericarp.session s
            where s.tenant_id = asked.tenant_id and s.id = asked.id and s.expires_at > clock_timestamp())
$$
"""

SIGNATURES = (
    "open_session(uuid, text, text, integer, integer, integer, uuid, integer, bytea)",
    "use_session(uuid, text)",
    "close_session(uuid, text, uuid, integer, bytea)",
    "expired_sessions(integer)",
    "close_expired_session(uuid, text, uuid, integer, bytea)",
    "gone_sessions(uuid[], text[])",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in (
        *TABLE,
        OPEN_SESSION,
        USE_SESSION,
        CLOSE_SESSION,
        EXPIRED_SESSIONS,
        CLOSE_EXPIRED_SESSION,
        GONE_SESSIONS,
    ):
        op.execute(statement)
    for signature in SIGNATURES:
        op.execute(f"revoke all on function pericarp.{signature} from public")
        op.execute(f"grant execute on function pericarp.{signature} to pericarp_quota")


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for signature in SIGNATURES:
        op.execute(f"drop function pericarp.{signature}")
    op.execute("drop table pericarp.session")
