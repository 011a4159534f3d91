"""Rights of a key: its kind, scopes, addresses and limits; when it was last used; tokens that are denied; and a
channel that tells every gateway of a change.

Revision 0011, after 0010. A key of the kind `admin` has a text of its own form, so whoever holds one that was made
before cannot use it any more: those keys are revoked here, with that reason, and new ones are made by `key create`.
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

KEY = (
    "alter table pericarp.key add column kind text",
    "alter table pericarp.key add column scopes text[] not null default '{}'",
    "alter table pericarp.key add column allowed_cidrs cidr[] not null default '{}'",
    "alter table pericarp.key add column limits jsonb not null default '{}'",
    "alter table pericarp.key add column revoked_reason text",
    "alter table pericarp.key add column last_used_at timestamptz",
    "alter table pericarp.key add column last_used_address inet",
    "comment on column pericarp.key.allowed_cidrs is 'empty: from everywhere'",
    "comment on column pericarp.key.last_used_at is 'written in batches, some seconds late'",
    # Row security is forced on the owner too; these two changes are about every tenant's rows.
    "alter table pericarp.key no force row level security",
    """
    update pericarp.key
       set kind = case role when 'search' then 'data' else 'admin' end,
           scopes = case role when 'search' then array['rerank', 'sessions', 'usage']
                              when 'tenant_admin' then array['contain', 'keys', 'policy', 'rerank', 'sessions', 'usage']
                              when 'auditor' then array['audit', 'usage']
                              else array['audit', 'contain', 'keys', 'metrics', 'policy', 'rerank', 'sessions',
                                         'tenants', 'usage'] end,
           revoked_at = case when role = 'search' then revoked_at else coalesce(revoked_at, clock_timestamp()) end,
           revoked_reason = case when revoked_at is not null then 'revoked'
                                 when role <> 'search' then 'old_form' end
    """,
    "alter table pericarp.key force row level security",
    "alter table pericarp.key alter column kind set not null",
    """
    alter table pericarp.key add constraint key_kind_check
        check (kind = case role when 'search' then 'data' else 'admin' end)
    """,
    "alter table pericarp.key add constraint key_revoked_check check (revoked_at is null or revoked_reason is not null)",
    "grant update (name, expires_at, scopes, allowed_cidrs, limits, revoked_reason) on pericarp.key to pericarp_app",
)

DENIED_TOKEN = (
    """
    create table pericarp.denied_token (
        tenant_id uuid not null,
        issuer text not null,
        jti text not null,
        denied_at timestamptz not null default clock_timestamp(),
        until timestamptz not null,
        constraint denied_token_pkey primary key (tenant_id, issuer, jti),
        constraint denied_token_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id)
    )
    """,
    "comment on column pericarp.denied_token.until is 'after it the token is expired anyway, and the row goes'",
    "alter table pericarp.denied_token enable row level security",
    "alter table pericarp.denied_token force row level security",
    """
    create policy own_rows on pericarp.denied_token
        using (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
        with check (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
    """,
    "create policy lookup on pericarp.denied_token for select to current_user using (true)",
    "grant select, insert, update (until), delete on pericarp.denied_token to pericarp_app",
)

FIND_KEY = """
create function pericarp.find_key(p_key_id text)
returns table (
    tenant_id uuid, tenant_name text, suspended boolean, policy text,
    kind text, role text, scopes text[], allowed_cidrs cidr[], limits text, revoked boolean, expires_in_s float8,
    secret_digest bytea, pepper_version integer, secret_expires_in_s float8
)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select k.tenant_id, t.name, t.suspended_at is not null,
           (select p.body::text from pericarp.policy p
             where p.tenant_id = k.tenant_id order by p.version desc limit 1),
           k.kind, k.role, k.scopes, k.allowed_cidrs, k.limits::text, k.revoked_at is not null,
           extract(epoch from k.expires_at - clock.now)::float8,
           s.digest, s.pepper_version, extract(epoch from s.not_after - clock.now)::float8
      from pericarp.key k
      join pericarp.tenant t on t.id = k.tenant_id
      join pericarp.key_secret s on s.tenant_id = k.tenant_id and s.key_id = k.id,
           (select clock_timestamp() as now) clock
     where k.id = p_key_id
$$
"""

OLD_FIND_KEY = """
create function pericarp.find_key(p_key_id text)
returns table (
    tenant_id uuid, tenant_name text, suspended boolean, role text, revoked boolean, expired boolean,
    policy text, secret_digest bytea, pepper_version integer, secret_expired boolean
)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select k.tenant_id, t.name, t.suspended_at is not null, k.role, k.revoked_at is not null,
           coalesce(k.expires_at <= clock_timestamp(), false),
           (select p.body::text from pericarp.policy p
             where p.tenant_id = k.tenant_id order by p.version desc limit 1),
           s.digest, s.pepper_version, coalesce(s.not_after <= clock_timestamp(), false)
      from pericarp.key k
      join pericarp.tenant t on t.id = k.tenant_id
      join pericarp.key_secret s on s.tenant_id = k.tenant_id and s.key_id = k.id
     where k.id = p_key_id
$$
"""

FIND_IDENTITY = """
create function pericarp.find_identity(p_tenant_name text, p_issuer text, p_jti text)
returns table (tenant_id uuid, tenant_name text, suspended boolean, policy text, denied boolean)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select t.id, t.name, t.suspended_at is not null,
           (select p.body::text from pericarp.policy p
             where p.tenant_id = t.id order by p.version desc limit 1),
           exists (select from pericarp.denied_token d
                    where d.tenant_id = t.id and d.issuer = p_issuer and d.jti = p_jti)
      from pericarp.tenant t where t.name = p_tenant_name
$$
"""

NOTE_KEY_USES = """
create function pericarp.note_key_uses(
    p_tenants uuid[], p_key_ids text[], p_ages_s float8[], p_addresses text[]
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_use record;
begin
    -- In the order of the ids, so that two gateways never wait for each other in a circle.
    for v_use in
        select u.tenant_id, u.key_id, clock_timestamp() - make_interval(secs => u.age_s) as used_at, u.address
          from unnest(p_tenants, p_key_ids, p_ages_s, p_addresses) u (tenant_id, key_id, age_s, address)
         order by u.key_id
    loop
        perform set_config('app.tenant_id', v_use.tenant_id::text, true);
        update pericarp.key k
           set last_used_at = v_use.used_at, last_used_address = nullif(v_use.address, '')::inet
         where k.tenant_id = v_use.tenant_id and k.id = v_use.key_id
           and (k.last_used_at is null or k.last_used_at < v_use.used_at);
    end loop;
end $$
"""

TELL_CHANGE = """
create function pericarp.tell_change() returns trigger
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_row jsonb := to_jsonb(coalesce(new, old));
begin
    perform pg_notify('pericarp_changes', case tg_table_name
        when 'key' then 'key:' || (v_row ->> 'id')
        when 'key_secret' then 'key:' || (v_row ->> 'key_id')
        when 'tenant' then 'tenant:' || (v_row ->> 'id')
        else 'tenant:' || (v_row ->> 'tenant_id') end);
    return null;
end $$
"""

# What a gateway may have kept, and what changes it. Noting a use is no change, and is not told.
TRIGGERS = {
    "tenant": "insert or update or delete",
    "policy": "insert or update or delete",
    "denied_token": "insert or update or delete",
    "key_secret": "insert or update or delete",
    "key": "insert or delete or update of role, kind, scopes, allowed_cidrs, limits, expires_at, revoked_at",
}

SIGNATURES = (
    "find_key(text)",
    "find_identity(text, text, text)",
    "note_key_uses(uuid[], text[], float8[], text[])",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop function pericarp.find_key(text)")
    for statement in (*KEY, *DENIED_TOKEN, FIND_KEY, FIND_IDENTITY, NOTE_KEY_USES, TELL_CHANGE):
        op.execute(statement)
    for signature in SIGNATURES:
        op.execute(f"revoke all on function pericarp.{signature} from public")
        op.execute(f"grant execute on function pericarp.{signature} to pericarp_quota")
    op.execute("revoke all on function pericarp.tell_change() from public")
    for table, events in TRIGGERS.items():
        op.execute(
            f"create trigger {table}_told after {events} on pericarp.{table} "
            "for each row execute function pericarp.tell_change()"
        )


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for table in TRIGGERS:
        op.execute(f"drop trigger {table}_told on pericarp.{table}")
    op.execute("drop function pericarp.tell_change()")
    for signature in SIGNATURES:
        op.execute(f"drop function pericarp.{signature}")
    op.execute("drop table pericarp.denied_token")
    for column in (
        "kind",
        "scopes",
        "allowed_cidrs",
        "limits",
        "revoked_reason",
        "last_used_at",
        "last_used_address",
    ):
        op.execute(f"alter table pericarp.key drop column {column} cascade")
    op.execute(OLD_FIND_KEY)
    op.execute("revoke all on function pericarp.find_key(text) from public")
    op.execute("grant execute on function pericarp.find_key(text) to pericarp_quota")
