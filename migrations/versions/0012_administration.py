"""Administration: tenants contained, deleted and purged, keys contained, answers that are kept, workers that are told.

Revision 0012, after 0011. What is contained or deleted is refused by `find_key` from the next request on. A
purge removes every row of a tenant but its entries of the log, whatever tables there are by then, and only once
the tenant's grace is over. `repeat` keeps the answer of a POST for who sends it twice; `worker` is what gateways
say of their workers, so that any of them, and the command line, can tell of all.
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

OWN_ROWS = "tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid"

COLUMNS = (
    """
    alter table pericarp.tenant
        add column contained_at timestamptz,
        add column deleted_at timestamptz,
        add column purge_after timestamptz,
        add constraint tenant_deleted_check check ((deleted_at is null) = (purge_after is null))
    """,
    "alter table pericarp.key add column contained_at timestamptz",
    "create index tenant_purge on pericarp.tenant (purge_after) where purge_after is not null",
    "grant update (contained_at, deleted_at, purge_after) on pericarp.tenant to pericarp_app",
    "grant update (contained_at) on pericarp.key to pericarp_app",
)

TABLES = (
    """
    create table pericarp.repeat (
        tenant_id uuid not null,
        key_id text not null,
        idempotency_key text not null,
        digest bytea not null,
        answer bytea not null,
        receipt uuid,
        created_at timestamptz not null default clock_timestamp(),
        expires_at timestamptz not null,
        constraint repeat_pkey primary key (tenant_id, key_id, idempotency_key),
        constraint repeat_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id),
        constraint repeat_digest_check check (octet_length(digest) = 32)
    )
    """,
    "comment on column pericarp.repeat.answer is 'wrapped under the master key: it may hold a new key''s text'",
    "create index repeat_expires on pericarp.repeat (expires_at)",
    "grant select, insert, delete on pericarp.repeat to pericarp_app",
    """
    create table pericarp.worker (
        tenant_id uuid not null,
        gateway uuid not null,
        pid integer not null,
        running integer not null,
        jobs bigint not null,
        since timestamptz not null,
        reported_at timestamptz not null default clock_timestamp(),
        constraint worker_pkey primary key (tenant_id, gateway, pid),
        constraint worker_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id)
    ) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000)
    """,
    "create index worker_gateway on pericarp.worker (gateway)",
    "create index worker_reported on pericarp.worker (reported_at)",
    "grant select on pericarp.worker to pericarp_app",
    *(
        statement
        for table in ("repeat", "worker")
        for statement in (
            f"alter table pericarp.{table} enable row level security",
            f"alter table pericarp.{table} force row level security",
            f"create policy own_rows on pericarp.{table} using ({OWN_ROWS}) with check ({OWN_ROWS})",
            f"create policy lookup on pericarp.{table} for select to current_user using (true)",
            f"create policy forget on pericarp.{table} for delete to current_user using (true)",
        )
    ),
)

TENANT_COLUMNS = "id, name, created_at, suspended_at, contained_at, deleted_at, purge_after"
TENANT_TYPES = """
    id uuid, name text, created_at timestamptz, suspended_at timestamptz, contained_at timestamptz,
    deleted_at timestamptz, purge_after timestamptz
"""
STATE = """
    case when t.deleted_at is not null then 'deleted' when t.contained_at is not null then 'contained'
         when t.suspended_at is not null then 'suspended' else 'active' end
"""
_QUALIFIED = ", ".join(f"t.{name.strip()}" for name in TENANT_COLUMNS.split(","))

FIND_TENANT = f"""
create function pericarp.find_tenant(p_name text) returns table ({TENANT_TYPES})
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$ select {_QUALIFIED} from pericarp.tenant t where t.name = p_name $$
"""

PAGE_TENANTS = f"""
create function pericarp.page_tenants(p_after text, p_most integer, p_state text) returns table ({TENANT_TYPES})
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    select {_QUALIFIED} from pericarp.tenant t
     where t.name > p_after and (p_state = '' or p_state = {STATE})
     order by t.name limit p_most
$$
"""

DUE_PURGES = f"""
create function pericarp.due_purges(p_most integer) returns table ({TENANT_TYPES})
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select {_QUALIFIED} from pericarp.tenant t
     where t.purge_after <= clock_timestamp() order by t.purge_after limit p_most
$$
"""

# Tables that refer to others go first; which ones these are, the violation tells, so a later table needs no word here.
PURGE_TENANT = """
create function pericarp.purge_tenant(p_tenant uuid) returns table (of_table text, removed bigint)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_table text;
    v_left text[];
    v_again text[];
    v_count bigint;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    perform from pericarp.tenant t
      where t.id = p_tenant and t.purge_after <= clock_timestamp() for update;
    if not found then
        return;  -- restored, purged by another, or its grace is not over
    end if;
    select array_agg(c.relname order by c.relname) into v_left
      from pg_class c join pg_attribute a on a.attrelid = c.oid
     where c.relnamespace = 'pericarp'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition
       and a.attname = 'tenant_id' and not a.attisdropped and c.relname not like 'audit\\_%';
    while cardinality(v_left) > 0 loop
        v_again := '{}';
        foreach v_table in array v_left loop
            begin
                execute format('delete from pericarp.%I where tenant_id = $1', v_table) using p_tenant;
                get diagnostics v_count = row_count;
                of_table := v_table;
                removed := v_count;
                return next;
            exception when foreign_key_violation then
                v_again := v_again || v_table;
            end;
        end loop;
        if v_again = v_left then
            raise exception 'rows of % are still referred to', v_again;
        end if;
        v_left := v_again;
    end loop;
    delete from pericarp.tenant t where t.id = p_tenant;  -- and with it the audit key
    of_table := 'tenant';
    removed := 1;
    return next;
end $$
"""

FORGET_REPEATS = """
create function pericarp.forget_repeats() returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_count bigint;
begin
    delete from pericarp.repeat r where r.expires_at <= clock_timestamp();
    get diagnostics v_count = row_count;
    return v_count;
end $$
"""

HALTED = """
create function pericarp.halted(p_tenants uuid[], p_keys text[])
returns table (tenant_id uuid, key_id text)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select t.id, '' from pericarp.tenant t
     where t.id = any (p_tenants) and (t.contained_at is not null or t.deleted_at is not null)
    union all
    select asked.id, '' from unnest(p_tenants) asked (id)
     where not exists (select from pericarp.tenant t where t.id = asked.id)
    union all
    select k.tenant_id, k.id from pericarp.key k where k.id = any (p_keys) and k.contained_at is not null
$$
"""

REPORT_WORKERS = """
create function pericarp.report_workers(
    p_gateway uuid, p_tenants uuid[], p_pids integer[], p_running integer[], p_jobs bigint[], p_since_ms bigint[]
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_row record;
begin
    -- In the order of the key, so that two reports never wait for each other in a circle.
    delete from pericarp.worker w
     where w.gateway = p_gateway or w.reported_at < clock_timestamp() - interval '1 minute';
    for v_row in
        select * from unnest(p_tenants, p_pids, p_running, p_jobs, p_since_ms)
            r (tenant_id, pid, running, jobs, since_ms) order by r.tenant_id, r.pid
    loop
        perform set_config('app.tenant_id', v_row.tenant_id::text, true);
        insert into pericarp.worker (tenant_id, gateway, pid, running, jobs, since)
        select v_row.tenant_id, p_gateway, v_row.pid, v_row.running, v_row.jobs,
               clock_timestamp() - interval '1 millisecond' * v_row.since_ms
          from pericarp.tenant t where t.id = v_row.tenant_id
        on conflict (tenant_id, gateway, pid) do nothing;
    end loop;
    perform set_config('app.tenant_id', '', true);
end $$
"""

LIST_WORKERS = """
create function pericarp.list_workers() returns table (
    tenant_id uuid, gateway uuid, pid integer, running integer, jobs bigint, since timestamptz,
    reported_at timestamptz
)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select w.tenant_id, w.gateway, w.pid, w.running, w.jobs, w.since, w.reported_at from pericarp.worker w
     where w.reported_at >= clock_timestamp() - interval '1 minute'
     order by w.tenant_id, w.gateway, w.pid
$$
"""

FIND_KEY = """
create or replace function pericarp.find_key(p_key_id text)
returns table (
    tenant_id uuid, tenant_name text, suspended boolean, policy text,
    kind text, role text, scopes text[], allowed_cidrs cidr[], limits text, revoked boolean, expires_in_s float8,
    secret_digest bytea, pepper_version integer, secret_expires_in_s float8
)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select k.tenant_id, t.name, {stopped},
           (select p.body::text from pericarp.policy p
             where p.tenant_id = k.tenant_id order by p.version desc limit 1),
           k.kind, k.role, k.scopes, k.allowed_cidrs, k.limits::text, {revoked},
           extract(epoch from k.expires_at - clock.now)::float8,
           s.digest, s.pepper_version, extract(epoch from s.not_after - clock.now)::float8
      from pericarp.key k
      join pericarp.tenant t on t.id = k.tenant_id
      join pericarp.key_secret s on s.tenant_id = k.tenant_id and s.key_id = k.id,
           (select clock_timestamp() as now) clock
     where k.id = p_key_id
$$
"""

FIND_IDENTITY = """
create or replace function pericarp.find_identity(p_tenant_name text, p_issuer text, p_jti text)
returns table (tenant_id uuid, tenant_name text, suspended boolean, policy text, denied boolean)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select t.id, t.name, {stopped},
           (select p.body::text from pericarp.policy p
             where p.tenant_id = t.id order by p.version desc limit 1),
           exists (select from pericarp.denied_token d
                    where d.tenant_id = t.id and d.issuer = p_issuer and d.jti = p_jti)
      from pericarp.tenant t where t.name = p_tenant_name
$$
"""

KEY_TOLD = """
create trigger key_told after insert or delete or
    update of role, kind, scopes, allowed_cidrs, limits, expires_at, revoked_at{more}
    on pericarp.key for each row execute function pericarp.tell_change()
"""
STOPPED = "coalesce(t.suspended_at, t.contained_at, t.deleted_at) is not null"
REVOKED = "coalesce(k.revoked_at, k.contained_at) is not null"

OF_APP = (
    "find_tenant(text)",
    "page_tenants(text, integer, text)",
    "due_purges(integer)",
    "purge_tenant(uuid)",
    "list_workers()",
)
OF_QUOTA = (
    "forget_repeats()",
    "halted(uuid[], text[])",
    "report_workers(uuid, uuid[], integer[], integer[], bigint[], bigint[])",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop function pericarp.find_tenant(text), pericarp.list_tenants()")
    for statement in (
        *COLUMNS,
        *TABLES,
        FIND_TENANT,
        PAGE_TENANTS,
        DUE_PURGES,
        PURGE_TENANT,
        FORGET_REPEATS,
        HALTED,
        REPORT_WORKERS,
        LIST_WORKERS,
        FIND_KEY.format(stopped=STOPPED, revoked=REVOKED),
        FIND_IDENTITY.format(stopped=STOPPED),
        "drop trigger key_told on pericarp.key",
        KEY_TOLD.format(more=", contained_at"),
    ):
        op.execute(statement)
    for role, signatures in (("pericarp_app", OF_APP), ("pericarp_quota", OF_QUOTA)):
        for signature in signatures:
            op.execute(f"revoke all on function pericarp.{signature} from public")
            op.execute(f"grant execute on function pericarp.{signature} to {role}")


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute(FIND_KEY.format(stopped="t.suspended_at is not null", revoked="k.revoked_at is not null"))
    op.execute(FIND_IDENTITY.format(stopped="t.suspended_at is not null"))
    op.execute("drop trigger key_told on pericarp.key")
    op.execute(KEY_TOLD.format(more=""))
    for signature in (*OF_APP, *OF_QUOTA):
        op.execute(f"drop function pericarp.{signature}")
    op.execute("drop table pericarp.worker, pericarp.repeat")
    op.execute("alter table pericarp.key drop column contained_at")
    op.execute(
        "alter table pericarp.tenant drop column contained_at, drop column deleted_at, drop column purge_after"
    )
    for name, arguments, condition in (
        ("find_tenant", "p_name text", "where t.name = p_name"),
        ("list_tenants", "", "order by t.name"),
    ):
        types = arguments.removeprefix("p_name ")
        op.execute(
            f"create function pericarp.{name}({arguments})"
            " returns table (id uuid, name text, created_at timestamptz, suspended_at timestamptz)"
            " language sql stable security definer set search_path = pg_catalog, pg_temp"
            f" as $$ select t.id, t.name, t.created_at, t.suspended_at from pericarp.tenant t {condition} $$"
        )
        op.execute(f"revoke all on function pericarp.{name}({types}) from public")
        op.execute(f"grant execute on function pericarp.{name}({types}) to pericarp_app")
