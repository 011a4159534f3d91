"""The Merkle tree over the log: a queue of leaves, the leaves by their index, the tiles, the signed checkpoints.

Revision 0014, after 0013. A trigger puts the leaf of every entry into the queue, in the entry's own transaction; the
sequencer (`tenants.sequencer`) takes leaves out of it and into the tree, in the order of the queue. It calls
`begin_integration` and `integrate` in one transaction, under an advisory lock, so any number of gateways may try.
Entries from before this revision are queued by it.

A leaf is 112 bytes (`tenants.envelope`). Queue, tiles and checkpoints hold nothing of one tenant alone and are out of
every runtime role's reach; the leaves have row security. The triggers deter; the evidence is the signed checkpoints.
"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

LOCK = 0x70726303
"""Advisory locks: "prc", 3; 1 is in `tenants.database`, 2 in `tenants.provisioning`."""
OWN_ROWS = "tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid"
ENVELOPE = """
    convert_to('pericarp/leaf/v1', 'SQL_ASCII') || int4send({of}.schema_version) || int4send({of}.orphan::integer)
    || int8send((extract(epoch from {of}.recorded_at) * 1000000)::bigint)
    || uuid_send({of}.tenant_id) || uuid_send({of}.id) || uuid_send({of}.request_id) || sha256({of}.body)
"""
TENANT = "encode(substring({of}.envelope from 33 for 16), 'hex')::uuid"
ID = "encode(substring({of}.envelope from 49 for 16), 'hex')::uuid"

TABLES = (
    """
    create table pericarp.audit_waiting (
        position bigint generated always as identity,
        envelope bytea not null,
        constraint audit_waiting_pkey primary key (position),
        constraint audit_waiting_envelope_check check (octet_length(envelope) = 112)
    ) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000)
    """,
    """
    create table pericarp.audit_leaf (
        tenant_id uuid not null,
        id uuid not null,
        index bigint not null,
        envelope bytea not null,
        constraint audit_leaf_pkey primary key (tenant_id, id),
        constraint audit_leaf_index_key unique (index),
        constraint audit_leaf_envelope_check check (octet_length(envelope) = 112)
    )
    """,
    "comment on column pericarp.audit_leaf.index is 'in the tree, from 0 on, without a gap'",
    "alter table pericarp.audit_leaf enable row level security",
    "alter table pericarp.audit_leaf force row level security",
    f"create policy own_rows on pericarp.audit_leaf using ({OWN_ROWS}) with check ({OWN_ROWS})",
    "create policy integrate on pericarp.audit_leaf to current_user using (true) with check (true)",
    "grant select on pericarp.audit_leaf to pericarp_app",
    """
    create table pericarp.audit_tile (
        level integer not null,
        number bigint not null,
        hashes bytea not null,
        constraint audit_tile_pkey primary key (level, number),
        constraint audit_tile_hashes_check check (
            octet_length(hashes) between 32 and 8192 and octet_length(hashes) % 32 = 0
        )
    )
    """,
    "alter table pericarp.audit_tile alter column hashes set storage external",  # hashes do not compress
    """
    create table pericarp.audit_checkpoint (
        size bigint not null,
        root bytea not null,
        note text not null,
        recorded_at timestamptz not null default clock_timestamp(),
        constraint audit_checkpoint_pkey primary key (size),
        constraint audit_checkpoint_size_check check (size > 0),
        constraint audit_checkpoint_root_check check (octet_length(root) = 32)
    )
    """,
)

QUEUE_LEAF = f"""
create function pericarp.queue_leaf() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
    insert into pericarp.audit_waiting (envelope) values ({ENVELOPE.format(of="new")});
    return null;
end $$
"""

# A tile only grows: what it held, it holds.
REFUSE_SHRINKING = """
create function pericarp.refuse_shrinking() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
    if (new.level, new.number) is distinct from (old.level, old.number)
       or substring(new.hashes from 1 for octet_length(old.hashes)) <> old.hashes
    then
        raise exception 'tiles of the log only grow' using errcode = '42501';
    end if;
    return new;
end $$
"""

TRIGGERS = (
    """
    create trigger audit_inbox_queued after insert on pericarp.audit_inbox
        for each row execute function pericarp.queue_leaf()
    """,
    "alter table pericarp.audit_inbox enable always trigger audit_inbox_queued",
    """
    create trigger audit_waiting_unchanged before update or truncate on pericarp.audit_waiting
        for each statement execute function pericarp.refuse_change()
    """,
    "alter table pericarp.audit_waiting enable always trigger audit_waiting_unchanged",
    """
    create trigger audit_tile_kept before delete or truncate on pericarp.audit_tile
        for each statement execute function pericarp.refuse_change()
    """,
    "alter table pericarp.audit_tile enable always trigger audit_tile_kept",
    """
    create trigger audit_tile_grows before update on pericarp.audit_tile
        for each row execute function pericarp.refuse_shrinking()
    """,
    "alter table pericarp.audit_tile enable always trigger audit_tile_grows",
    *(
        statement
        for table in ("audit_leaf", "audit_checkpoint")
        for statement in (
            f"""
            create trigger {table}_append_only before update or delete or truncate on pericarp.{table}
                for each statement execute function pericarp.refuse_change()
            """,
            f"alter table pericarp.{table} enable always trigger {table}_append_only",
        )
    ),
)

# Row security is forced upon the owner too, who is to read every tenant's entries this once.
QUEUE_OLD_ENTRIES = (
    "alter table pericarp.audit_inbox no force row level security",
    f"""
    insert into pericarp.audit_waiting (envelope)
    select {ENVELOPE.format(of="i")} from pericarp.audit_inbox i order by i.recorded_at, i.tenant_id, i.id
    """,
    "alter table pericarp.audit_inbox force row level security",
)

# Where another has the lock, only the queue's head is told. A gateway that stops in between must not keep the lock.
BEGIN_INTEGRATION = f"""
create function pericarp.begin_integration(
    p_most integer,
    out locked boolean, out head bigint, out size bigint, out note text, out leaves bigint,
    out positions bigint[], out envelopes bytea[]
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    select min(w.position) into head from pericarp.audit_waiting w;
    locked := pg_try_advisory_xact_lock({LOCK});
    if not locked then
        return;
    end if;
    perform set_config('synchronous_commit', 'on', true);
    perform set_config('idle_in_transaction_session_timeout', '5000', true);
    select c.size, c.note into size, note from pericarp.audit_checkpoint c order by c.size desc limit 1;
    select coalesce(max(l.index) + 1, 0) into leaves from pericarp.audit_leaf l;
    select coalesce(array_agg(w.position order by w.position), '{{}}'),
           coalesce(array_agg(w.envelope order by w.position), '{{}}')
      into positions, envelopes
      from (select q.position, q.envelope from pericarp.audit_waiting q order by q.position limit p_most) w;
end $$
"""

INTEGRATE = f"""
create function pericarp.integrate(
    p_from bigint, p_positions bigint[], p_levels integer[], p_numbers bigint[], p_tiles bytea[],
    p_root bytea, p_note text
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_size bigint;
    v_count bigint;
begin
    if not pg_try_advisory_xact_lock({LOCK}) then
        raise exception 'another integrates at the moment' using errcode = '55P03';
    end if;
    select coalesce(max(c.size), 0) into v_size from pericarp.audit_checkpoint c;
    if v_size <> p_from then
        raise exception 'the tree has % leaves, not %', v_size, p_from;
    end if;
    with taken as (
        delete from pericarp.audit_waiting w using unnest(p_positions) with ordinality p(position, place)
         where w.position = p.position
        returning p.place, w.envelope)
    insert into pericarp.audit_leaf (tenant_id, id, index, envelope)
    select {TENANT.format(of="t")}, {ID.format(of="t")}, p_from + t.place - 1, t.envelope
      from taken t order by t.place;
    get diagnostics v_count = row_count;
    if v_count <> cardinality(p_positions) then
        raise exception 'of % leaves % waited', cardinality(p_positions), v_count;
    end if;
    insert into pericarp.audit_tile (level, number, hashes)
    select * from unnest(p_levels, p_numbers, p_tiles)
    on conflict (level, number) do update set hashes = excluded.hashes;
    insert into pericarp.audit_checkpoint (size, root, note) values (p_from + v_count, p_root, p_note);
end $$
"""

# Of what was restored row by row, the queue may have leaves that are in the tree already.
FORGET_INTEGRATED = f"""
create function pericarp.forget_integrated(p_most integer) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_count bigint;
begin
    delete from pericarp.audit_waiting w
     where w.position in (select q.position from pericarp.audit_waiting q order by q.position limit p_most)
       and exists (select from pericarp.audit_leaf l
                    where l.tenant_id = {TENANT.format(of="w")} and l.id = {ID.format(of="w")});
    get diagnostics v_count = row_count;
    return v_count;
end $$
"""

NEWEST_CHECKPOINT = """
create function pericarp.newest_checkpoint() returns text
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    select c.note from pericarp.audit_checkpoint c order by c.size desc limit 1
$$
"""

READ_TILES = """
create function pericarp.read_tiles(p_levels integer[], p_numbers bigint[])
returns table (level integer, number bigint, hashes bytea)
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    select t.level, t.number, t.hashes
      from unnest(p_levels, p_numbers) p(level, number)
      join pericarp.audit_tile t on t.level = p.level and t.number = p.number
$$
"""

READ_LEAVES = """
create function pericarp.read_leaves(p_from bigint, p_most integer) returns table (index bigint, envelope bytea)
language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
    select l.index, l.envelope from pericarp.audit_leaf l
     where l.index >= p_from and l.index < p_from + p_most order by l.index
$$
"""

CALLED = (
    "begin_integration(integer)",
    "integrate(bigint, bigint[], integer[], bigint[], bytea[], bytea, text)",
    "forget_integrated(integer)",
    "newest_checkpoint()",
    "read_tiles(integer[], bigint[])",
    "read_leaves(bigint, integer)",
)
INNER = ("queue_leaf()", "refuse_shrinking()")


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in (
        *(*TABLES, *QUEUE_OLD_ENTRIES, QUEUE_LEAF, REFUSE_SHRINKING, *TRIGGERS),
        *(BEGIN_INTEGRATION, INTEGRATE, FORGET_INTEGRATED, NEWEST_CHECKPOINT, READ_TILES, READ_LEAVES),
    ):
        op.execute(statement)
    for signature in (*CALLED, *INNER):
        op.execute(f"revoke all on function pericarp.{signature} from public")
    for signature in CALLED:
        op.execute(f"grant execute on function pericarp.{signature} to pericarp_quota")


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop trigger audit_inbox_queued on pericarp.audit_inbox")
    for signature in CALLED:
        op.execute(f"drop function pericarp.{signature}")
    op.execute(
        "drop table pericarp.audit_waiting, pericarp.audit_leaf, pericarp.audit_tile, pericarp.audit_checkpoint"
    )
    for signature in INNER:
        op.execute(f"drop function pericarp.{signature}")
