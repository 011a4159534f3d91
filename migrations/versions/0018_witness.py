"""Witnesses of the log: what each has cosigned, and whose turn it is to ask.

Revision 0018, after 0017. Gateways send the newest checkpoint to the witnesses (`service.cosigning`) and keep their
cosignatures here, beside the checkpoints. The first to claim a witness asks it, so of any number of gateways one does at a
time; a claim is over by itself, so a gateway that dies keeps nobody waiting. A clock that jumps doubles its time at most.
"""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

TABLES = (
    """
    create table pericarp.audit_cosignature (
        size bigint not null,
        witness text not null,
        line text not null,
        recorded_at timestamptz not null default clock_timestamp(),
        constraint audit_cosignature_pkey primary key (size, witness),
        constraint audit_cosignature_size_fkey foreign key (size) references pericarp.audit_checkpoint (size)
    )
    """,
    """
    create table pericarp.audit_witness (
        witness text not null,
        claimed_at timestamptz not null,
        size bigint not null default 0,
        constraint audit_witness_pkey primary key (witness)
    )
    """,
    "comment on column pericarp.audit_witness.size is 'of the newest tree that it has cosigned'",
    """
    create trigger audit_cosignature_append_only before update or delete or truncate on pericarp.audit_cosignature
        for each statement execute function pericarp.refuse_change()
    """,
    "alter table pericarp.audit_cosignature enable always trigger audit_cosignature_append_only",
)

# Nothing is claimed where there is nothing to ask for, unless `p_always` is set.
CLAIM_WITNESS = """
create function pericarp.claim_witness(
    p_witness text, p_every_s double precision, p_always boolean,
    out claimed boolean, out cosigned bigint, out newest bigint
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    select coalesce(max(c.size), 0) into newest from pericarp.audit_checkpoint c;
    select coalesce((select w.size from pericarp.audit_witness w where w.witness = p_witness), 0) into cosigned;
    claimed := false;
    if newest = 0 or (newest <= cosigned and not p_always) then
        return;
    end if;
    insert into pericarp.audit_witness as w (witness, claimed_at) values (p_witness, clock_timestamp())
    on conflict (witness) do update set claimed_at = excluded.claimed_at
     where abs(extract(epoch from excluded.claimed_at - w.claimed_at)) >= p_every_s;
    claimed := found;
end $$
"""

# A witness that cosigns the same tree again says nothing new.
KEEP_COSIGNATURE = """
create function pericarp.keep_cosignature(p_witness text, p_size bigint, p_line text) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    insert into pericarp.audit_cosignature (size, witness, line) values (p_size, p_witness, p_line)
    on conflict do nothing;
    update pericarp.audit_witness w set size = p_size where w.witness = p_witness and w.size < p_size;
end $$
"""

# Of trees with more than `p_above` leaves the one that most witnesses have cosigned lately, then the newest; without a
# cosignature, or where it lags by more than `p_behind`, the newest of all.
COSIGNED_CHECKPOINT = """
create function pericarp.cosigned_checkpoint(
    p_above bigint, p_behind interval, out note text, out witnesses text[], out lines text[]
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_size bigint;
    v_recorded_at timestamptz;
begin
    select c.size, c.recorded_at into v_size, v_recorded_at
      from pericarp.audit_checkpoint c order by c.size desc limit 1;
    select s.size into v_size
      from (select k.size from pericarp.audit_cosignature k
             where k.size > p_above order by k.size desc limit 64) s
      join pericarp.audit_checkpoint c on c.size = s.size
     where p_behind is null or c.recorded_at > v_recorded_at - p_behind
     group by s.size order by count(*) desc, s.size desc limit 1;
    if not found then
        select max(c.size) into v_size from pericarp.audit_checkpoint c;
    end if;
    select c.note into note from pericarp.audit_checkpoint c where c.size = v_size;
    select coalesce(array_agg(k.witness order by k.witness), '{}'), coalesce(array_agg(k.line order by k.witness), '{}')
      into witnesses, lines
      from (select * from pericarp.audit_cosignature a where a.size = v_size order by a.witness limit 16) k;
end $$
"""

CALLED = (
    "claim_witness(text, double precision, boolean)",
    "keep_cosignature(text, bigint, text)",
    "cosigned_checkpoint(bigint, interval)",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in (*TABLES, CLAIM_WITNESS, KEEP_COSIGNATURE, COSIGNED_CHECKPOINT):
        op.execute(statement)
    for signature in CALLED:
        op.execute(f"revoke all on function pericarp.{signature} from public")
        op.execute(f"grant execute on function pericarp.{signature} to pericarp_quota")


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for signature in CALLED:
        op.execute(f"drop function pericarp.{signature}")
    op.execute("drop table pericarp.audit_cosignature, pericarp.audit_witness")
