"""Erasure and retention: an entry's body may go, once an entry in the tree says that it does.

Revision 0019, after 0018. A warrant is an entry of the tenant's own log (`admin.log_prune`, `admin.subject_erase`) that
says which bodies go; `issue_warrant` reads it out of the entry's own bytes, and refuses one that is too early by the
tenant's policy. `prune_bodies` takes bodies away under a warrant whose leaf is in the tree, and the trigger on the inbox
lets nothing else through: no other column, no other entry, nobody before the warrant is in the tree.

What auditors look an entry up by (revision 0016) goes with its body, and not otherwise.

`audit_retention` has what the policy of a purged tenant said, for its entries outlive it.
"""

from __future__ import annotations

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

LOCK = 0x70726304
"""Advisory locks: "prc", 4; 3 is in revision 0014. Of two keys, the second is of the tenant."""
OWN_ROWS = "tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid"
TABLES = ("audit_warrant", "audit_retention")

STATEMENTS = (
    "alter table pericarp.audit_inbox alter column body drop not null",
    "comment on column pericarp.audit_inbox.body is 'null once it was pruned'",
    """
    create table pericarp.audit_warrant (
        tenant_id uuid not null,
        id uuid not null,
        before timestamptz,
        entries uuid[] not null default '{}',
        done_at timestamptz,
        constraint audit_warrant_pkey primary key (tenant_id, id),
        constraint audit_warrant_check check ((before is null) = (cardinality(entries) > 0))
    )
    """,
    "comment on column pericarp.audit_warrant.id is 'of the entry that says so'",
    "comment on column pericarp.audit_warrant.before is 'every body that was recorded before it goes'",
    "comment on column pericarp.audit_warrant.entries is 'else these bodies go'",
    """
    create unique index audit_warrant_open on pericarp.audit_warrant (tenant_id)
        where done_at is null and before is not null
    """,
    """
    create table pericarp.audit_retention (
        tenant_id uuid not null,
        retention_days integer not null,
        constraint audit_retention_pkey primary key (tenant_id),
        constraint audit_retention_days_check check (retention_days > 0)
    )
    """,
    *(
        statement
        for table in TABLES
        for statement in (
            f"alter table pericarp.{table} enable row level security",
            f"alter table pericarp.{table} force row level security",
            f"create policy own_rows on pericarp.{table} using ({OWN_ROWS}) with check ({OWN_ROWS})",
            f"create policy retain on pericarp.{table} to current_user using (true) with check (true)",
            f"""
            create trigger {table}_kept before delete or truncate on pericarp.{table}
                for each statement execute function pericarp.refuse_change()
            """,
            f"alter table pericarp.{table} enable always trigger {table}_kept",
        )
    ),
    # A warrant is done once, and nothing else of it ever changes.
    """
    create trigger audit_warrant_unchanged before update of tenant_id, id, before, entries on pericarp.audit_warrant
        for each statement execute function pericarp.refuse_change()
    """,
    "alter table pericarp.audit_warrant enable always trigger audit_warrant_unchanged",
)

# Runs with the rights of whoever updates: who cannot see the warrant cannot use it.
REFUSE_UNWARRANTED = """
create function pericarp.refuse_unwarranted() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
    if new.body is not null
       or (new.tenant_id, new.id, new.request_id, new.orphan, new.recorded_at, new.schema_version)
          is distinct from
          (old.tenant_id, old.id, old.request_id, old.orphan, old.recorded_at, old.schema_version)
       or not exists (
           select from pericarp.audit_warrant w
             join pericarp.audit_leaf l on l.tenant_id = w.tenant_id and l.id = w.id
            where w.tenant_id = old.tenant_id and w.done_at is null
              and (old.recorded_at < w.before or old.id = any (w.entries)))
    then
        raise exception 'entries of the log are never changed' using errcode = '42501';
    end if;
    return new;
end $$
"""

APPEND_ONLY = """
create trigger audit_inbox_append_only before {events} or delete or truncate on pericarp.audit_inbox
    for each statement execute function pericarp.refuse_change()
"""
BUT_THE_BODY = "update of tenant_id, id, request_id, orphan, recorded_at, schema_version"
TRIGGERS = (
    """
    create trigger audit_inbox_pruned before update on pericarp.audit_inbox
        for each row execute function pericarp.refuse_unwarranted()
    """,
    "alter table pericarp.audit_inbox enable always trigger audit_inbox_pruned",
)

# What revision 0016 wrote of a body, found again by the same reading of it: so each row is looked up by its key.
UNINDEX_BODY = r"""
create function pericarp.unindex_body() returns trigger
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_text text := convert_from(old.body, 'UTF8');
    v_body jsonb;
    v_print bigint;
begin
    if position('\u0000' in v_text) > 0 then
        v_text := regexp_replace(v_text, '(?<!\\)((?:\\\\)*)\\u0000', '\1', 'g');
    end if;
    v_body := v_text::jsonb;
    delete from pericarp.audit_search s
     where s.tenant_id = old.tenant_id and s.recorded_at = old.recorded_at and s.id = old.id;
    for v_print in
        select distinct
               ('x' || encode(substring(decode(translate(left(p.print, 12), '-_', '+/'), 'base64')
                                        from 1 for 8), 'hex'))::bit(64)::bigint
          from (select v_body -> 'query'
                union all select jsonb_array_elements(v_body -> 'documents')
                union all select jsonb_array_elements(v_body #> '{details,queries}')) i(item),
               lateral (values (i.item ->> 'text'), (i.item ->> 'image')) p(print)
         where length(p.print) = 43
           and translate(left(p.print, 12),
                         'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_', '') = ''
    loop
        delete from pericarp.audit_input a
         where a.tenant_id = old.tenant_id and a.print = v_print and a.recorded_at = old.recorded_at
           and a.id = old.id;
    end loop;
    delete from pericarp.audit_risk r
     where r.tenant_id = old.tenant_id and r.recorded_at = old.recorded_at and r.id = old.id
       and r.category = any (array(select c.key from jsonb_each(v_body #> '{details,screening,risks}') m,
                                                     lateral jsonb_each(m.value) c) || ''::text)
       and r.band = any ('{1,2,3,4,5,6,7,8,9,10}');
    return null;
end $$
"""

REFUSE_INDEXED = """
create function pericarp.refuse_indexed() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
    if not exists (select from pericarp.audit_inbox i
                    where i.tenant_id = old.tenant_id and i.id = old.id and i.body is null)
    then
        raise exception 'entries of the log are never changed' using errcode = '42501';
    end if;
    return old;
end $$
"""
INDEXES = ("audit_search", "audit_input", "audit_risk")
UNINDEXING = (
    """
    create trigger audit_inbox_unindexed after update of body on pericarp.audit_inbox
        for each row execute function pericarp.unindex_body()
    """,
    "alter table pericarp.audit_inbox enable always trigger audit_inbox_unindexed",
    *(
        statement
        for table in INDEXES
        for statement in (
            f"drop trigger {table}_append_only on pericarp.{table}",
            f"""
            create trigger {table}_append_only before update or truncate on pericarp.{table}
                for each statement execute function pericarp.refuse_change()
            """,
            f"alter table pericarp.{table} enable always trigger {table}_append_only",
            f"""
            create trigger {table}_pruned before delete on pericarp.{table}
                for each row execute function pericarp.refuse_indexed()
            """,
            f"alter table pericarp.{table} enable always trigger {table}_pruned",
        )
    ),
)

# Of a purged tenant, what its policy said; of the installation's own log, and of tenants purged before there was
# retention, the default.
KEPT_DAYS = """
create function pericarp.kept_days(p_tenant uuid, p_default_days integer) returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        (select (p.body ->> 'retention_days')::integer from pericarp.policy p
          where p.tenant_id = p_tenant order by p.version desc limit 1),
        (select r.retention_days from pericarp.audit_retention r where r.tenant_id = p_tenant),
        p_default_days)
$$
"""

MICROSECONDS = "(extract(epoch from {}) * 1000000)::bigint"

# The day's cut, so that a tenant's bodies are looked for once a day. A tenant's leaves are skipped from one tenant to the
# next: one look into the index for each.
DUE_PRUNING = f"""
create function pericarp.due_pruning(p_default_days integer, p_bodies integer, p_most integer)
returns table (tenant_id uuid, retention_days integer, before_us bigint, bodies bigint)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_today timestamptz := date_trunc('day', clock_timestamp() at time zone 'utc') at time zone 'utc';
    v_since timestamptz;
    v_first timestamptz;
    v_before timestamptz;
    v_found integer := 0;
begin
    for tenant_id in
        with recursive tenants (id) as (
            (select l.tenant_id from pericarp.audit_leaf l order by l.tenant_id limit 1)
            union all
            select (select l.tenant_id from pericarp.audit_leaf l where l.tenant_id > t.id
                     order by l.tenant_id limit 1)
              from tenants t where t.id is not null)
        select t.id from tenants t where t.id is not null
    loop
        continue when exists (
            select from pericarp.audit_warrant w
             where w.tenant_id = due_pruning.tenant_id and w.done_at is null and w.before is not null);
        perform set_config('app.tenant_id', tenant_id::text, true);
        retention_days := pericarp.kept_days(tenant_id, p_default_days);
        v_since := coalesce((select max(w.before) from pericarp.audit_warrant w
                              where w.tenant_id = due_pruning.tenant_id), '-infinity');
        v_before := v_today - make_interval(hours => 24 * retention_days);
        select i.recorded_at into v_first from pericarp.audit_inbox i
         where i.tenant_id = due_pruning.tenant_id and i.recorded_at >= v_since and i.recorded_at < v_before
         order by i.recorded_at limit 1;
        continue when not found;
        v_before := coalesce(
            (select greatest(i.recorded_at, v_first + interval '1 microsecond') from pericarp.audit_inbox i
              where i.tenant_id = due_pruning.tenant_id and i.recorded_at >= v_since and i.recorded_at < v_before
              order by i.recorded_at offset p_bodies limit 1), v_before);
        before_us := {MICROSECONDS.format("v_before")};
        select count(*) into bodies from pericarp.audit_inbox i
         where i.tenant_id = due_pruning.tenant_id and i.recorded_at >= v_since and i.recorded_at < v_before
           and i.body is not null;
        return next;
        v_found := v_found + 1;
        exit when v_found >= p_most;
    end loop;
    perform set_config('app.tenant_id', '', true);
end $$
"""

# Of several gateways that found the same bodies due, one writes the entry; held to the end of its transaction.
CLAIM_PRUNING = f"""
create function pericarp.claim_pruning(p_tenant uuid, p_before_us bigint) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select pg_try_advisory_xact_lock({LOCK}, hashtext(p_tenant::text)) and not exists (
        select from pericarp.audit_warrant w
         where w.tenant_id = p_tenant
           and (w.done_at is null and w.before is not null
                or w.before >= timestamptz 'epoch' + p_before_us * interval '1 microsecond'))
$$
"""

# In the transaction that wrote the entry: both stand, or neither.
ISSUE_WARRANT = """
create function pericarp.issue_warrant(p_tenant uuid, p_entry uuid, p_default_days integer) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_body jsonb;
    v_details jsonb;
    v_days integer;
    v_before timestamptz;
    v_recorded timestamptz;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    select convert_from(i.body, 'UTF8')::jsonb, i.recorded_at into strict v_body, v_recorded
      from pericarp.audit_inbox i where i.tenant_id = p_tenant and i.id = p_entry;
    v_details := v_body -> 'details';
    if v_body ->> 'operation' = 'admin.subject_erase' then
        -- else what that one covers would be covered by nothing
        if exists (select from pericarp.audit_warrant w, jsonb_array_elements_text(v_details -> 'entries') e (id)
                    where w.tenant_id = p_tenant and w.id = e.id::uuid)
        then
            raise exception 'no warrant takes another one away' using errcode = '42501';
        end if;
        insert into pericarp.audit_warrant (tenant_id, id, entries)
        select p_tenant, p_entry, array_agg(e.id::uuid)
          from jsonb_array_elements_text(v_details -> 'entries') e (id);
        return;
    end if;
    v_days := pericarp.kept_days(p_tenant, p_default_days);
    v_before := timestamptz 'epoch' + (v_details ->> 'before_us')::bigint * interval '1 microsecond';
    if v_body ->> 'operation' is distinct from 'admin.log_prune'
       or (v_details ->> 'retention_days')::integer is distinct from v_days
       or v_before is null or v_before > v_recorded - make_interval(hours => 24 * v_days)
    then
        raise exception 'the tenant''s policy does not allow it' using errcode = '42501';
    end if;
    insert into pericarp.audit_warrant (tenant_id, id, before) values (p_tenant, p_entry, v_before);
end $$
"""

OPEN_WARRANTS = """
create function pericarp.open_warrants(p_most integer) returns table (tenant_id uuid, id uuid)
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    select w.tenant_id, w.id from pericarp.audit_warrant w
      join pericarp.audit_leaf l on l.tenant_id = w.tenant_id and l.id = w.id
     where w.done_at is null order by w.tenant_id, w.id limit p_most
$$
"""

# Gateways take turns at a warrant; one that finds it taken leaves it. At most so many bodies, and bytes of them but for the
# last: what a body is looked up by is a row for each of its inputs. A warrant is done when nothing is left of it.
PRUNE_BODIES = """
create function pericarp.prune_bodies(
    p_tenant uuid, p_warrant uuid, p_most integer, p_bytes bigint
) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_warrant pericarp.audit_warrant;
    v_since timestamptz;
    v_count integer;
begin
    select w.* into v_warrant from pericarp.audit_warrant w
     where w.tenant_id = p_tenant and w.id = p_warrant and w.done_at is null for update skip locked;
    if not found then
        return null;
    end if;
    perform set_config('app.tenant_id', p_tenant::text, true);
    if v_warrant.before is null then
        update pericarp.audit_inbox i set body = null
         where i.tenant_id = p_tenant and i.id in (
               select s.id from (
                   select g.id, octet_length(g.body) as size,
                          sum(octet_length(g.body)) over (order by g.id) as sum
                     from pericarp.audit_inbox g
                    where g.tenant_id = p_tenant and g.id = any (v_warrant.entries) and g.body is not null
                    order by g.id limit p_most) s
                where s.sum - s.size < p_bytes);
    else
        v_since := coalesce((select max(w.before) from pericarp.audit_warrant w
                              where w.tenant_id = p_tenant and w.done_at is not null), '-infinity');
        update pericarp.audit_inbox i set body = null
         where i.tenant_id = p_tenant and i.id in (
               select s.id from (
                   select g.id, octet_length(g.body) as size,
                          sum(octet_length(g.body)) over (order by g.recorded_at, g.id) as sum
                     from (select o.id, o.recorded_at, o.body from pericarp.audit_inbox o
                            where o.tenant_id = p_tenant and o.recorded_at >= v_since
                              and o.recorded_at < v_warrant.before and o.body is not null
                            order by o.recorded_at, o.id limit p_most) g) s
                where s.sum - s.size < p_bytes);
    end if;
    get diagnostics v_count = row_count;
    if v_count = 0 then
        update pericarp.audit_warrant w set done_at = clock_timestamp()
         where w.tenant_id = p_tenant and w.id = p_warrant;
    end if;
    return v_count;
end $$
"""

# What thresholds learnt of one end user: of its fingerprints, which the caller computes.
FORGET_END_USER = """
create function pericarp.forget_end_user(p_tenant uuid, p_end_users text[]) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_count bigint;
    v_all bigint := 0;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    delete from pericarp.review r where r.tenant_id = p_tenant and r.end_user = any (p_end_users);
    get diagnostics v_count = row_count;
    v_all := v_all + v_count;
    delete from pericarp.traffic_user u where u.tenant_id = p_tenant and u.end_user = any (p_end_users);
    get diagnostics v_count = row_count;
    return v_all + v_count;
end $$
"""

KEEP_RETENTION = """
    insert into pericarp.audit_retention (tenant_id, retention_days)
    select p_tenant, (p.body ->> 'retention_days')::integer from pericarp.policy p
     where p.tenant_id = p_tenant and p.body ? 'retention_days' order by p.version desc limit 1
    on conflict (tenant_id) do update set retention_days = excluded.retention_days;
"""
BEFORE_REMOVING = "    select array_agg(c.relname order by c.relname) into v_left"

OF_APP = (
    "due_pruning(integer, integer, integer)",
    "claim_pruning(uuid, bigint)",
    "issue_warrant(uuid, uuid, integer)",
    "forget_end_user(uuid, text[])",
)
OF_QUOTA = ("open_warrants(integer)", "prune_bodies(uuid, uuid, integer, bigint)")
INNER = ("refuse_unwarranted()", "unindex_body()", "refuse_indexed()", "kept_days(uuid, integer)")


def _purge_tenant() -> str:
    """As revision 0012 made it."""
    purge: str = op.get_context().opts["script"].get_revision("0012").module.PURGE_TENANT
    return purge.replace("create function", "create or replace function", 1)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop trigger audit_inbox_append_only on pericarp.audit_inbox")
    for statement in (
        *STATEMENTS,
        *(UNINDEX_BODY, REFUSE_INDEXED, *UNINDEXING),
        *(REFUSE_UNWARRANTED, *TRIGGERS, APPEND_ONLY.format(events=BUT_THE_BODY)),
        "alter table pericarp.audit_inbox enable always trigger audit_inbox_append_only",
        *(KEPT_DAYS, DUE_PRUNING, CLAIM_PRUNING, ISSUE_WARRANT, OPEN_WARRANTS, PRUNE_BODIES, FORGET_END_USER),
        _purge_tenant().replace(BEFORE_REMOVING, KEEP_RETENTION + BEFORE_REMOVING, 1),
    ):
        op.execute(statement)
    for signature in (*OF_APP, *OF_QUOTA, *INNER):
        op.execute(f"revoke all on function pericarp.{signature} from public")
    for role, signatures in (("pericarp_app", OF_APP), ("pericarp_quota", OF_QUOTA)):
        for signature in signatures:
            op.execute(f"grant execute on function pericarp.{signature} to {role}")


def downgrade() -> None:
    """Fails where a body was pruned already: the earlier version has no word for that."""
    op.execute("set local lock_timeout = '5s'")
    op.execute(_purge_tenant())
    op.execute("drop trigger audit_inbox_pruned on pericarp.audit_inbox")
    op.execute("drop trigger audit_inbox_unindexed on pericarp.audit_inbox")
    for table in INDEXES:
        op.execute(f"drop trigger {table}_pruned on pericarp.{table}")
        op.execute(f"drop trigger {table}_append_only on pericarp.{table}")
        op.execute(
            f"create trigger {table}_append_only before update or delete or truncate on pericarp.{table}"
            " for each statement execute function pericarp.refuse_change()"
        )
        op.execute(f"alter table pericarp.{table} enable always trigger {table}_append_only")
    op.execute("drop trigger audit_inbox_append_only on pericarp.audit_inbox")
    op.execute(APPEND_ONLY.format(events="update"))
    op.execute("alter table pericarp.audit_inbox enable always trigger audit_inbox_append_only")
    for signature in (*OF_APP, *OF_QUOTA, *INNER):
        op.execute(f"drop function pericarp.{signature}")
    op.execute("drop table pericarp.audit_warrant, pericarp.audit_retention")
    op.execute("comment on column pericarp.audit_inbox.body is null")
    op.execute("alter table pericarp.audit_inbox alter column body set not null")
