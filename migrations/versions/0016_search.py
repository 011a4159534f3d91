"""What auditors look entries up by: narrow rows that a trigger makes of each entry, in the entry's own transaction.

Revision 0016, after 0014. `audit_search` has what one entry has once; `audit_input` a row for each text and image that
it tells of, by the first 8 bytes of its fingerprint; `audit_risk` the highest score of each category from 0.1 on, in
bands of a tenth, and under '' the highest of all. Bodies stay the truth: these rows are made of them and of nothing
else. Each index leads with the tenant and ends with the order of a page,
newest first, so that two of them can be merged without a look at the tables.

Row security hides other tenants' rows before any filter that might tell of them runs, so an index serves only
operators that Postgres knows to leak nothing: plain comparisons, and none of arrays or jsonb. `log_tenants` tells whose
entries there are, of tenants that were purged as well. Entries from before this revision are indexed by it.
"""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision = "0014"
branch_labels = None
depends_on = None

OWN_ROWS = "tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid"
TABLES = ("audit_search", "audit_input", "audit_risk")

STATEMENTS = (
    """
    create table pericarp.audit_search (
        tenant_id uuid not null,
        recorded_at timestamptz not null,
        id uuid not null,
        key_id text not null,
        operation text not null,
        decision text not null,
        action text not null,
        session text not null,
        constraint audit_search_pkey primary key (tenant_id, recorded_at, id)
    )
    """,
    "comment on column pericarp.audit_search.action is 'of screening; empty: nothing was screened'",
    "create index audit_search_key on pericarp.audit_search (tenant_id, key_id, recorded_at, id)",
    "create index audit_search_operation on pericarp.audit_search (tenant_id, operation, recorded_at, id)",
    """
    create index audit_search_decision on pericarp.audit_search (tenant_id, decision, recorded_at, id)
        where decision <> 'answered'
    """,
    """
    create index audit_search_action on pericarp.audit_search (tenant_id, action, recorded_at, id)
        where action not in ('', 'allow')
    """,
    """
    create index audit_search_session on pericarp.audit_search (tenant_id, session, recorded_at, id)
        where session <> ''
    """,
    """
    create table pericarp.audit_input (
        tenant_id uuid not null,
        print bigint not null,
        recorded_at timestamptz not null,
        id uuid not null,
        constraint audit_input_pkey primary key (tenant_id, print, recorded_at, id)
    )
    """,
    "comment on column pericarp.audit_input.print is 'first 8 bytes of the fingerprint, a signed number, big end first'",
    """
    create table pericarp.audit_risk (
        tenant_id uuid not null,
        category text not null,
        band integer not null,
        recorded_at timestamptz not null,
        id uuid not null,
        score integer not null,
        constraint audit_risk_pkey primary key (tenant_id, category, band, recorded_at, id) include (score),
        constraint audit_risk_band_check check (band = score / 100000 and band > 0)
    )
    """,
    "comment on column pericarp.audit_risk.score is 'micro-units'",
    *(
        statement
        for table in TABLES
        for statement in (
            f"alter table pericarp.{table} enable row level security",
            f"alter table pericarp.{table} force row level security",
            f"create policy own_rows on pericarp.{table} using ({OWN_ROWS}) with check ({OWN_ROWS})",
            f"create policy index on pericarp.{table} to current_user using (true) with check (true)",
            f"grant select on pericarp.{table} to pericarp_app",
            f"""
            create trigger {table}_append_only before update or delete or truncate on pericarp.{table}
                for each statement execute function pericarp.refuse_change()
            """,
            f"alter table pericarp.{table} enable always trigger {table}_append_only",
        )
    ),
)

# JSON may hold \\u0000, which no text of Postgres can: it is left out here, and the body stays as it is.
INDEX_BODY = r"""
create function pericarp.index_body(p_tenant uuid, p_id uuid, p_recorded_at timestamptz, p_body bytea) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_text text := convert_from(p_body, 'UTF8');
    v_body jsonb;
begin
    if position('\u0000' in v_text) > 0 then
        v_text := regexp_replace(v_text, '(?<!\\)((?:\\\\)*)\\u0000', '\1', 'g');
    end if;
    v_body := v_text::jsonb;
    insert into pericarp.audit_search (tenant_id, recorded_at, id, key_id, operation, decision, action, session)
    values (p_tenant, p_recorded_at, p_id, coalesce(v_body ->> 'key_id', ''), coalesce(v_body ->> 'operation', ''),
            coalesce(v_body ->> 'decision', ''), coalesce(v_body #>> '{details,screening,action}', ''),
            coalesce(v_body ->> 'session', ''));
    insert into pericarp.audit_input (tenant_id, print, recorded_at, id)
    select distinct p_tenant,
           ('x' || encode(substring(decode(translate(left(p.print, 12), '-_', '+/'), 'base64') from 1 for 8), 'hex'))
               ::bit(64)::bigint,
           p_recorded_at, p_id
      from (select v_body -> 'query'
            union all select jsonb_array_elements(v_body -> 'documents')
            union all select jsonb_array_elements(v_body #> '{details,queries}')) i(item),
           lateral (values (i.item ->> 'text'), (i.item ->> 'image')) p(print)
     where length(p.print) = 43  -- a regular expression would cost more than all the rest
       and translate(left(p.print, 12), 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_', '') = '';
    if v_body #> '{details,screening,risks}' is not null then
        insert into pericarp.audit_risk (tenant_id, category, band, recorded_at, id, score)
        select p_tenant, coalesce(r.category, ''), max(r.score) / 100000, p_recorded_at, p_id, max(r.score)
          from (select c.key as category, (c.value ->> 0)::integer as score
                  from jsonb_each(v_body #> '{details,screening,risks}') m, lateral jsonb_each(m.value) c) r
         where r.score >= 100000
         group by grouping sets ((r.category), ()) having max(r.score) is not null;
    end if;
end $$
"""

INDEX_ENTRY = """
create function pericarp.index_entry() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
    perform pericarp.index_body(new.tenant_id, new.id, new.recorded_at, new.body);
    return null;
end $$
"""

TRIGGERS = (
    """
    create trigger audit_inbox_indexed after insert on pericarp.audit_inbox
        for each row execute function pericarp.index_entry()
    """,
    "alter table pericarp.audit_inbox enable always trigger audit_inbox_indexed",
)

# Row security is forced upon the owner too, who is to read every tenant's entries this once.
INDEX_OLD_ENTRIES = (
    "alter table pericarp.audit_inbox no force row level security",
    "select count(pericarp.index_body(i.tenant_id, i.id, i.recorded_at, i.body)) from pericarp.audit_inbox i",
    "alter table pericarp.audit_inbox force row level security",
)

LOG_TENANTS = """
create function pericarp.log_tenants() returns setof uuid
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    with recursive told(tenant_id) as (
        (select s.tenant_id from pericarp.audit_search s order by s.tenant_id limit 1)
        union all
        select (select s.tenant_id from pericarp.audit_search s where s.tenant_id > t.tenant_id
                 order by s.tenant_id limit 1)
          from told t where t.tenant_id is not null)
    select t.tenant_id from told t where t.tenant_id is not null
$$
"""

FUNCTIONS = ("index_body(uuid, uuid, timestamptz, bytea)", "index_entry()", "log_tenants()")


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in (*STATEMENTS, INDEX_BODY, INDEX_ENTRY, *INDEX_OLD_ENTRIES, *TRIGGERS, LOG_TENANTS):
        op.execute(statement)
    for signature in FUNCTIONS:
        op.execute(f"revoke all on function pericarp.{signature} from public")
    op.execute("grant execute on function pericarp.log_tenants() to pericarp_quota")


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop trigger audit_inbox_indexed on pericarp.audit_inbox")
    for signature in ("index_entry()", "index_body(uuid, uuid, timestamptz, bytea)", "log_tenants()"):
        op.execute(f"drop function pericarp.{signature}")
    op.execute(f"drop table {', '.join(f'pericarp.{table}' for table in TABLES)}")
