"""Thresholds that learn: what they are, every change, the items that reviewers judge, what traffic is like, canaries.

Revision 0013, after 0012. `find_key` and `find_identity` tell what was learnt with the policy, so that a request reads
it without another statement. Changes are added, never altered. A canary under the nil UUID is every tenant's, as
a ceiling is. `review_vote` is what makes one vote of an end user's day.
"""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

OWN_ROWS = "tenant_id = nullif(current_setting('app.tenant_id', true), '')::uuid"
AGEING = ("review", "traffic", "traffic_user")
TABLES = ("threshold", "threshold_change", "review", "traffic", "traffic_user", "canary")

STATEMENTS = (
    """
    create table pericarp.threshold (
        tenant_id uuid not null,
        category text not null,
        mode text not null,
        version integer not null default 0,
        threshold float8 not null,
        anchor float8 not null,
        detectors text not null default '',
        day date not null,
        day_began_at float8 not null,
        frozen text not null default '',
        counts_from timestamptz,
        stepped_on date not null,
        constraint threshold_pkey primary key (tenant_id, category, mode),
        constraint threshold_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id),
        constraint threshold_range_check check (threshold between 0 and 1 and anchor between 0 and 1),
        constraint threshold_mode_check check (mode in ('text', 'image'))
    )
    """,
    "comment on column pericarp.threshold.version is 'of the last change'",
    "comment on column pericarp.threshold.day is 'of the last step, UTC'",
    "comment on column pericarp.threshold.day_began_at is 'the threshold when that day began'",
    "comment on column pericarp.threshold.counts_from is 'votes decided before it count no more: a rollback'",
    "comment on column pericarp.threshold.stepped_on is 'the last daily step, UTC'",
    "create index threshold_stepped on pericarp.threshold (stepped_on)",
    """
    grant select, insert,
        update (version, threshold, anchor, detectors, day, day_began_at, frozen, counts_from, stepped_on)
        on pericarp.threshold to pericarp_app
    """,
    """
    create table pericarp.threshold_change (
        tenant_id uuid not null,
        category text not null,
        mode text not null,
        version integer not null,
        changed_at timestamptz not null default clock_timestamp(),
        before float8 not null,
        after float8 not null,
        anchor float8 not null,
        reason text not null,
        frozen text not null default '',
        evidence jsonb not null,
        set_by text not null,
        set_role text not null,
        constraint threshold_change_pkey primary key (tenant_id, category, mode, version),
        constraint threshold_change_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id),
        constraint threshold_change_version_check check (version > 0)
    )
    """,
    "grant select, insert on pericarp.threshold_change to pericarp_app",
    """
    create table pericarp.review (
        tenant_id uuid not null,
        entry_id uuid not null,
        item text not null,
        category text not null,
        mode text not null,
        score float8 not null,
        stopped boolean not null,
        odds float8,
        end_user text not null,
        detectors text not null,
        day date not null,
        screened_at timestamptz not null default clock_timestamp(),
        volume bigint,
        appealed_at timestamptz,
        verdict text,
        decided_at timestamptz,
        decided_by text not null default '',
        decided_role text not null default '',
        votes boolean not null default false,
        constraint review_pkey primary key (tenant_id, entry_id, item, category, mode),
        constraint review_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id),
        constraint review_score_check check (score between 0 and 1),
        constraint review_mode_check check (mode in ('text', 'image')),
        constraint review_passed_check check (stopped or odds is not null),
        constraint review_odds_check check (odds is null or (odds > 0 and odds <= 1)),
        constraint review_appeal_check check (appealed_at is null or stopped),
        constraint review_verdict_check check (verdict in ('harmful', 'harmless')),
        constraint review_decided_check check (
            (verdict is null) = (decided_at is null) and (verdict is null) = (volume is null)
        ),
        constraint review_votes_check check (not votes or verdict is not null)
    )
    """,
    """
    comment on column pericarp.review.odds is
        'the chance that it had to be drawn; null: it was not, and is there to be appealed'
    """,
    "comment on column pericarp.review.end_user is 'a fingerprint under the tenant''s own key'",
    "comment on column pericarp.review.day is 'UTC'",
    "comment on column pericarp.review.volume is 'once decided: how many items the end user sent on that day'",
    """
    create unique index review_vote on pericarp.review (tenant_id, category, mode, end_user, day) where votes
    """,
    "create index review_screened on pericarp.review (tenant_id, screened_at)",
    "create index review_day on pericarp.review (day)",
    """
    grant select, insert,
        update (volume, appealed_at, verdict, decided_at, decided_by, decided_role, votes)
        on pericarp.review to pericarp_app
    """,
    """
    create table pericarp.traffic (
        tenant_id uuid not null,
        day date not null,
        category text not null,
        mode text not null,
        detectors text not null,
        items bigint not null,
        stopped bigint not null,
        histogram bigint[] not null,
        began_at timestamptz not null default clock_timestamp(),
        constraint traffic_pkey primary key (tenant_id, day, category, mode, detectors),
        constraint traffic_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id),
        constraint traffic_histogram_check check (cardinality(histogram) = 10)
    ) with (fillfactor = 50)
    """,
    "comment on column pericarp.traffic.day is 'UTC'",
    "create index traffic_day on pericarp.traffic (day)",
    "comment on column pericarp.traffic.histogram is 'items by score, in ten bins'",
    "grant select, insert, update (items, stopped, histogram) on pericarp.traffic to pericarp_app",
    """
    create table pericarp.traffic_user (
        tenant_id uuid not null,
        day date not null,
        mode text not null,
        end_user text not null,
        items bigint not null,
        constraint traffic_user_pkey primary key (tenant_id, day, mode, end_user),
        constraint traffic_user_tenant_fkey foreign key (tenant_id) references pericarp.tenant (id)
    ) with (fillfactor = 50)
    """,
    "create index traffic_user_day on pericarp.traffic_user (day)",
    "comment on column pericarp.traffic_user.day is 'UTC'",
    "comment on column pericarp.traffic_user.end_user is 'a fingerprint under the tenant''s own key'",
    "grant select, insert, update (items) on pericarp.traffic_user to pericarp_app",
    """
    create table pericarp.canary (
        tenant_id uuid not null,
        category text not null,
        mode text not null,
        name text not null,
        detectors text not null,
        score float8 not null,
        set_at timestamptz not null default clock_timestamp(),
        constraint canary_pkey primary key (tenant_id, category, mode, name),
        constraint canary_score_check check (score between 0 and 1),
        constraint canary_mode_check check (mode in ('text', 'image'))
    )
    """,
    "comment on column pericarp.canary.tenant_id is 'the nil id: of every tenant'",
    "grant select, insert, delete on pericarp.canary to pericarp_app",
    *(
        statement
        for table in TABLES
        for statement in (
            f"alter table pericarp.{table} enable row level security",
            f"alter table pericarp.{table} force row level security",
            f"create policy own_rows on pericarp.{table} using ({OWN_ROWS}) with check ({OWN_ROWS})",
        )
    ),
    *(
        f"create policy lookup on pericarp.{table} for select to current_user using (true)"
        for table in ("threshold", "ceiling", *AGEING)
    ),
    *(
        f"create policy forget on pericarp.{table} for delete to current_user using (true)"
        for table in AGEING
    ),
    """
    create trigger threshold_told after insert or delete or update of threshold, anchor, detectors
        on pericarp.threshold for each row execute function pericarp.tell_change()
    """,
)

# What was learnt counts below the ceiling alone: the tenant's own where it speaks, else the installation's.
ADAPTED = """
    (select jsonb_build_object(
                'most', coalesce(
                    (select (c.body ->> 'risk_threshold')::float8 from pericarp.ceiling c
                      where c.tenant_id = t.id order by c.version desc limit 1),
                    (select (c.body ->> 'risk_threshold')::float8 from pericarp.ceiling c
                      where c.tenant_id = '00000000-0000-0000-0000-000000000000'
                      order by c.version desc limit 1)),
                'learnt', jsonb_agg(
                    jsonb_build_array(h.category, h.mode, h.threshold, h.anchor, h.detectors)
                    order by h.category, h.mode))::text
       from pericarp.threshold h
      where h.tenant_id = t.id and h.threshold <> h.anchor
     having count(*) > 0)
"""

FIND_KEY = f"""
create function pericarp.find_key(p_key_id text)
returns table (
    tenant_id uuid, tenant_name text, suspended boolean, policy text, adapted text,
    kind text, role text, scopes text[], allowed_cidrs cidr[], limits text, revoked boolean, expires_in_s float8,
    secret_digest bytea, pepper_version integer, secret_expires_in_s float8
)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select k.tenant_id, t.name, coalesce(t.suspended_at, t.contained_at, t.deleted_at) is not null,
           (select p.body::text from pericarp.policy p
             where p.tenant_id = k.tenant_id order by p.version desc limit 1),
           {ADAPTED},
           k.kind, k.role, k.scopes, k.allowed_cidrs, k.limits::text,
           coalesce(k.revoked_at, k.contained_at) is not null,
           extract(epoch from k.expires_at - clock.now)::float8,
           s.digest, s.pepper_version, extract(epoch from s.not_after - clock.now)::float8
      from pericarp.key k
      join pericarp.tenant t on t.id = k.tenant_id
      join pericarp.key_secret s on s.tenant_id = k.tenant_id and s.key_id = k.id,
           (select clock_timestamp() as now) clock
     where k.id = p_key_id
$$
"""

FIND_IDENTITY = f"""
create function pericarp.find_identity(p_tenant_name text, p_issuer text, p_jti text)
returns table (tenant_id uuid, tenant_name text, suspended boolean, policy text, adapted text, denied boolean)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select t.id, t.name, coalesce(t.suspended_at, t.contained_at, t.deleted_at) is not null,
           (select p.body::text from pericarp.policy p
             where p.tenant_id = t.id order by p.version desc limit 1),
           {ADAPTED},
           exists (select from pericarp.denied_token d
                    where d.tenant_id = t.id and d.issuer = p_issuer and d.jti = p_jti)
      from pericarp.tenant t where t.name = p_tenant_name
$$
"""

# The clock is asked in UTC: a day means the same at every gateway.
DUE_THRESHOLDS = """
create function pericarp.due_thresholds(p_most integer) returns table (tenant_id uuid)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select distinct h.tenant_id from pericarp.threshold h join pericarp.tenant t on t.id = h.tenant_id
     where h.stepped_on < (clock_timestamp() at time zone 'utc')::date and t.deleted_at is null
     limit p_most
$$
"""

# Items go with their entries where a policy keeps those for a shorter time.
FORGET_EVIDENCE = """
create function pericarp.forget_evidence(p_traffic_days integer, p_review_days integer) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_today date := (clock_timestamp() at time zone 'utc')::date;
    v_count bigint;
    v_all bigint := 0;
begin
    delete from pericarp.traffic t where t.day < v_today - p_traffic_days;
    get diagnostics v_count = row_count;
    v_all := v_all + v_count;
    delete from pericarp.traffic_user u where u.day < v_today - p_traffic_days;
    get diagnostics v_count = row_count;
    v_all := v_all + v_count;
    delete from pericarp.review r
     where r.day < v_today - 1 and r.day < v_today - least(p_review_days, coalesce((
           select (p.body ->> 'retention_days')::integer from pericarp.policy p
            where p.tenant_id = r.tenant_id order by p.version desc limit 1), p_review_days));
    get diagnostics v_count = row_count;
    return v_all + v_count;
end $$
"""

FUNCTIONS = (
    ("find_key(text)", "pericarp_quota"),
    ("find_identity(text, text, text)", "pericarp_quota"),
    ("due_thresholds(integer)", "pericarp_app"),
    ("forget_evidence(integer, integer)", "pericarp_quota"),
)


def _grant() -> None:
    for signature, role in FUNCTIONS:
        op.execute(f"revoke all on function pericarp.{signature} from public")
        op.execute(f"grant execute on function pericarp.{signature} to {role}")


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop function pericarp.find_key(text), pericarp.find_identity(text, text, text)")
    for statement in (*STATEMENTS, FIND_KEY, FIND_IDENTITY, DUE_THRESHOLDS, FORGET_EVIDENCE):
        op.execute(statement)
    _grant()


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for signature, _ in FUNCTIONS:
        op.execute(f"drop function pericarp.{signature}")
    op.execute(f"drop table {', '.join(f'pericarp.{table}' for table in TABLES)}")
    op.execute("drop policy lookup on pericarp.ceiling")
    earlier = op.get_context().opts["script"].get_revision("0012").module
    op.execute(earlier.FIND_KEY.format(stopped=earlier.STOPPED, revoked=earlier.REVOKED))
    op.execute(earlier.FIND_IDENTITY.format(stopped=earlier.STOPPED))
    for signature, role in FUNCTIONS[:2]:
        op.execute(f"revoke all on function pericarp.{signature} from public")
        op.execute(f"grant execute on function pericarp.{signature} to {role}")
