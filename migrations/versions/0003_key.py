"""API keys, their secrets, and the one lookup that authenticates.

Revision 0003, after 0002. A key keeps its id while its secrets rotate. `key_id_key` is unique over all
tenants: the id is made by us from 71 random bits, so nobody can probe for another tenant's.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    create table pericarp.key (
        tenant_id uuid not null,
        id text not null,
        role text not null,
        name text,
        created_at timestamptz not null default clock_timestamp(),
        expires_at timestamptz,
        revoked_at timestamptz,
        constraint key_pkey primary key (tenant_id, id),
        constraint key_id_key unique (id),
        constraint key_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id),
        constraint key_id_check check (id ~ '^[0-9A-Za-z]{12}$'),
        constraint key_role_check check (role in ('search', 'tenant_admin', 'auditor', 'platform_admin'))
    )
    """,
    """
    create table pericarp.key_secret (
        tenant_id uuid not null,
        key_id text not null,
        digest bytea not null,
        pepper_version integer not null,
        created_at timestamptz not null default clock_timestamp(),
        not_after timestamptz,
        constraint key_secret_pkey primary key (tenant_id, key_id, digest),
        constraint key_secret_key_fkey foreign key (tenant_id, key_id)
            references pericarp.key (tenant_id, id),
        constraint key_secret_digest_check check (octet_length(digest) = 32)
    )
    """,
    *(
        statement
        for table in ("key", "key_secret")
        for statement in (
            f"alter table pericarp.{table} enable row level security",
            f"alter table pericarp.{table} force row level security",
            f"""
            create policy own_rows on pericarp.{table}
                using (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
                with check (tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid)
            """,
            f"create policy lookup on pericarp.{table} for select to current_user using (true)",
        )
    ),
    """
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
    """,
    "revoke all on function pericarp.find_key(text) from public",
    "grant execute on function pericarp.find_key(text) to pericarp_quota",
    "grant select, insert, update (revoked_at) on pericarp.key to pericarp_app",
    "grant select (tenant_id, key_id, created_at, not_after), insert, update (not_after) "
    "on pericarp.key_secret to pericarp_app",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop function pericarp.find_key(text)")
    op.execute("drop table pericarp.key_secret, pericarp.key")
