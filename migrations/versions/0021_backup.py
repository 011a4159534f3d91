"""Backups of the installation, and what was done to make sure of them: verified, drilled, restored.

Revision 0021. A row of `backup` is written once its backup is whole in the store, so no backup tells of itself: who
restores one writes its row again. `backup_check` has every attempt to read one back, also those that failed. Neither
has anything of one tenant alone.
"""

from __future__ import annotations

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

TABLES = (
    """
    create table pericarp.backup (
        sequence bigint not null,
        id uuid not null,
        kind text not null,
        parent bigint,
        log_size bigint not null,
        stored_bytes bigint not null,
        manifest_sha256 bytea not null,
        recorded_at timestamptz not null default clock_timestamp(),
        pruned_at timestamptz,
        constraint backup_pkey primary key (sequence),
        constraint backup_sequence_check check (sequence > 0 and (parent is null or parent < sequence)),
        constraint backup_kind_check check (
            kind in ('full', 'incremental') and (kind = 'full') = (parent is null)
        ),
        constraint backup_log_size_check check (log_size >= 0)
    )
    """,
    "comment on column pericarp.backup.log_size is 'leaves of the log that it has at least'",
    "create index backup_log_size on pericarp.backup (log_size) where pruned_at is null",
    """
    create table pericarp.backup_check (
        id uuid not null default gen_random_uuid(),
        sequence bigint not null,
        kind text not null,
        good boolean not null,
        duration_s double precision not null,
        recorded_at timestamptz not null default clock_timestamp(),
        constraint backup_check_pkey primary key (id),
        constraint backup_check_kind_check check (kind in ('verify', 'drill', 'restore'))
    )
    """,
    "create index backup_check_newest on pericarp.backup_check (kind, recorded_at) where good",
)

# Who restores a backup notes it again; the first row stands.
NOTE_BACKUP = """
create function pericarp.note_backup(
    p_sequence bigint, p_id uuid, p_kind text, p_parent bigint, p_log_size bigint, p_stored_bytes bigint,
    p_manifest_sha256 bytea
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    insert into pericarp.backup (sequence, id, kind, parent, log_size, stored_bytes, manifest_sha256)
    values (p_sequence, p_id, p_kind, p_parent, p_log_size, p_stored_bytes, p_manifest_sha256)
    on conflict (sequence) do nothing
$$
"""

NOTE_BACKUP_CHECK = """
create function pericarp.note_backup_check(
    p_sequence bigint, p_kind text, p_good boolean, p_duration_s double precision
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    insert into pericarp.backup_check (sequence, kind, good, duration_s)
    values (p_sequence, p_kind, p_good, p_duration_s)
$$
"""

NOTE_BACKUPS_PRUNED = """
create function pericarp.note_backups_pruned(p_sequences bigint[]) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    update pericarp.backup b set pruned_at = clock_timestamp()
     where b.sequence = any (p_sequences) and b.pruned_at is null
$$
"""

LIST_BACKUPS = """
create function pericarp.list_backups() returns table (
    sequence bigint, id uuid, kind text, parent bigint, log_size bigint, stored_bytes bigint,
    manifest_sha256 bytea, recorded_at timestamptz, pruned_at timestamptz, verified_at timestamptz,
    restored_at timestamptz
)
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    select b.sequence, b.id, b.kind, b.parent, b.log_size, b.stored_bytes, b.manifest_sha256, b.recorded_at,
           b.pruned_at,
           (select max(c.recorded_at) from pericarp.backup_check c
             where c.sequence = b.sequence and c.good and c.kind in ('verify', 'drill')),
           (select max(c.recorded_at) from pericarp.backup_check c
             where c.sequence = b.sequence and c.good and c.kind = 'restore')
      from pericarp.backup b order by b.sequence
$$
"""

# By the database's own clock. Null where there was none.
BACKUP_STANDING = """
create function pericarp.backup_standing(
    out newest bigint, out backup_age_s double precision, out verified_age_s double precision,
    out drilled_age_s double precision
)
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    select (select max(b.sequence) from pericarp.backup b where b.pruned_at is null),
           extract(epoch from clock_timestamp() - (select max(b.recorded_at) from pericarp.backup b)),
           extract(epoch from clock_timestamp() - (select max(c.recorded_at) from pericarp.backup_check c
                                                    where c.good and c.kind in ('verify', 'drill'))),
           extract(epoch from clock_timestamp() - (select max(c.recorded_at) from pericarp.backup_check c
                                                    where c.good and c.kind = 'drill'))
$$
"""

# Of each entry the first backup that is kept and has it; one that is not in the tree is in none, and has no row.
BACKUPS_OF_ENTRIES = """
create function pericarp.backups_of_entries(p_tenants uuid[], p_entries uuid[])
returns table (id uuid, sequence bigint)
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    select l.id, (select min(b.sequence) from pericarp.backup b
                   where b.pruned_at is null and b.log_size > l.index)
      from unnest(p_tenants, p_entries) as asked (tenant_id, id)
      join pericarp.audit_leaf l on l.tenant_id = asked.tenant_id and l.id = asked.id
$$
"""

BACKUP_OF_LEAF = """
create function pericarp.backup_of_leaf(p_index bigint) returns bigint
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    select min(b.sequence) from pericarp.backup b where b.pruned_at is null and b.log_size > p_index
$$
"""

OF_APP = {
    "note_backup(bigint, uuid, text, bigint, bigint, bigint, bytea)": NOTE_BACKUP,
    "note_backup_check(bigint, text, boolean, double precision)": NOTE_BACKUP_CHECK,
    "note_backups_pruned(bigint[])": NOTE_BACKUPS_PRUNED,
}
OF_QUOTA = {
    "list_backups()": LIST_BACKUPS,
    "backup_standing()": BACKUP_STANDING,
    "backups_of_entries(uuid[], uuid[])": BACKUPS_OF_ENTRIES,
    "backup_of_leaf(bigint)": BACKUP_OF_LEAF,
}


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in TABLES:
        op.execute(statement)
    for role, functions in (("pericarp_app", OF_APP), ("pericarp_quota", OF_QUOTA)):
        for signature, statement in functions.items():
            op.execute(statement)
            op.execute(f"revoke all on function pericarp.{signature} from public")
            op.execute(f"grant execute on function pericarp.{signature} to {role}")


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for signature in (*OF_APP, *OF_QUOTA):
        op.execute(f"drop function pericarp.{signature}")
    op.execute("drop table pericarp.backup, pericarp.backup_check")
