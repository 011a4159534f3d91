"""Admission: hold, settle, release and the closing of orphans, one statement each.

Revision 0006, after 0005. Each function binds the tenant that it is given, so row security holds in it too.
`hold` locks the tenant's quota row before it looks at slots: of one tenant's requests one at a time decides.
The time is the database's own, read after that lock, so that waiting for it counts.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

HOLD = """
create function pericarp.hold(
    p_tenant uuid, p_key_id text, p_request uuid, p_images integer, p_lease_ms integer,
    p_requests_per_minute integer, p_request_burst integer,
    p_images_per_minute integer, p_image_burst integer, p_concurrent integer,
    out violated text[], out retry_after_ms bigint,
    out held_slot integer, out held_token bigint, out held_until timestamptz,
    out requests_left bigint, out requests_more_ms bigint,
    out images_left bigint, out images_more_ms bigint, out slots_left integer
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz;
    v_quota pericarp.quota;
    v_request_step interval := interval '1 minute' / p_requests_per_minute;
    v_image_step interval := interval '1 minute' / p_images_per_minute;
    v_request_room interval := v_request_step * p_request_burst;
    v_image_room interval := v_image_step * p_image_burst;
    v_requests_tat timestamptz;
    v_images_tat timestamptz;
    v_busy integer;
    v_top integer;
    v_month date;
    v_slack interval;
    v_repeated boolean;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    violated := '{}';
    retry_after_ms := 0;

    -- The first request of a tenant makes its row; of two that race, one waits for the other's.
    select * into v_quota from pericarp.quota q where q.tenant_id = p_tenant and q.key_id = '' for update;
    if not found then
        insert into pericarp.quota (tenant_id) values (p_tenant) on conflict (tenant_id, key_id) do nothing;
        select * into strict v_quota from pericarp.quota q
         where q.tenant_id = p_tenant and q.key_id = '' for update;
    end if;
    v_now := clock_timestamp();
    v_requests_tat := greatest(v_quota.requests_tat, v_now);
    v_images_tat := greatest(v_quota.images_tat, v_now);
    select count(*) filter (where s.expires_at > v_now), coalesce(max(s.n), 0) into v_busy, v_top
      from pericarp.slot s where s.tenant_id = p_tenant;

    -- The same request again, because the first answer was lost: what it holds already, and no second charge.
    select h.slot, h.token, h.expires_at into held_slot, held_token, held_until
      from pericarp.hold h where h.tenant_id = p_tenant and h.request_id = p_request;
    v_repeated := found;

    if not v_repeated then
        if v_requests_tat + v_request_step - v_now > v_request_room then
            violated := violated || 'requests'::text;
            retry_after_ms := greatest(retry_after_ms, ceil(extract(epoch from
                v_requests_tat + v_request_step - v_now - v_request_room) * 1000)::bigint);
        end if;
        if p_images > 0 and v_images_tat + v_image_step * p_images - v_now > v_image_room then
            violated := violated || 'images'::text;
            retry_after_ms := greatest(retry_after_ms, ceil(extract(epoch from
                v_images_tat + v_image_step * p_images - v_now - v_image_room) * 1000)::bigint);
        end if;
        if v_busy >= p_concurrent then
            violated := violated || 'concurrency'::text;
            retry_after_ms := greatest(retry_after_ms, 1000);
        end if;
    end if;

    if not v_repeated and cardinality(violated) = 0 then
        v_requests_tat := v_requests_tat + v_request_step;
        v_images_tat := v_images_tat + v_image_step * p_images;
        v_busy := v_busy + 1;
        v_month := date_trunc('month', v_now at time zone 'UTC')::date;
        held_until := v_now + interval '1 millisecond' * p_lease_ms;
        update pericarp.quota q
           set requests_tat = v_requests_tat,
               images_tat = case when p_images > 0 then v_images_tat else q.images_tat end,
               month = v_month,
               month_requests = case when q.month = v_month then q.month_requests else 0 end + 1,
               month_images = case when q.month = v_month then q.month_images else 0 end + p_images
         where q.tenant_id = p_tenant and q.key_id = '';
        -- SKIP LOCKED: a slot that a late settle is just giving back is not waited for.
        update pericarp.slot s set expires_at = held_until, token = s.token + 1
         where s.tenant_id = p_tenant and s.n = (
               select f.n from pericarp.slot f where f.tenant_id = p_tenant and f.expires_at <= v_now
                order by f.n limit 1 for update skip locked)
        returning s.n, s.token into held_slot, held_token;
        if not found then
            insert into pericarp.slot (tenant_id, n, expires_at, token)
            values (p_tenant, v_top + 1, held_until, 1)
            returning n, token into held_slot, held_token;
        end if;
        insert into pericarp.hold (tenant_id, request_id, key_id, slot, token,
                                   images, images_per_minute, held_at, expires_at)
        values (p_tenant, p_request, p_key_id, held_slot, held_token,
                p_images, p_images_per_minute, v_now, held_until);
    end if;

    v_slack := v_request_room - (v_requests_tat - v_now);
    requests_left := greatest(0, floor(extract(epoch from v_slack) / extract(epoch from v_request_step)));
    requests_more_ms := case when v_slack >= v_request_room then 0 else ceil(1000 * extract(epoch from
        (requests_left + 1) * v_request_step - v_slack)) end;
    v_slack := v_image_room - (v_images_tat - v_now);
    images_left := greatest(0, floor(extract(epoch from v_slack) / extract(epoch from v_image_step)));
    images_more_ms := case when v_slack >= v_image_room then 0 else ceil(1000 * extract(epoch from
        (images_left + 1) * v_image_step - v_slack)) end;
    slots_left := greatest(0, p_concurrent - v_busy);
end $$
"""

LET_GO = """
create function pericarp.let_go(p_hold pericarp.hold, p_images integer) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_unused integer := greatest(0, p_hold.images - greatest(0, p_images));
begin
    -- A refund never exceeds the reservation, and comes at the rate at which it was charged.
    if v_unused > 0 then
        update pericarp.quota q
           set images_tat = q.images_tat - interval '1 minute' / p_hold.images_per_minute * v_unused,
               month_images = greatest(0, q.month_images - v_unused)
         where q.tenant_id = p_hold.tenant_id and q.key_id = '';
    end if;
    update pericarp.slot s set expires_at = '-infinity'
     where s.tenant_id = p_hold.tenant_id and s.n = p_hold.slot and s.token = p_hold.token;
end $$
"""

SETTLE = """
create function pericarp.settle(
    p_tenant uuid, p_request uuid, p_images integer, p_schema_version integer, p_body bytea
) returns uuid
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_hold pericarp.hold;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    delete from pericarp.hold h where h.tenant_id = p_tenant and h.request_id = p_request
    returning * into v_hold;
    if found then
        perform pericarp.let_go(v_hold, p_images);
    end if;
    return pericarp.append_entry(p_tenant, p_request, p_schema_version, p_body);
end $$
"""

RELEASE = """
create function pericarp.release(p_tenant uuid, p_request uuid) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_hold pericarp.hold;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    delete from pericarp.hold h where h.tenant_id = p_tenant and h.request_id = p_request
    returning * into v_hold;
    if not found then
        return false;
    end if;
    perform pericarp.let_go(v_hold, 0);
    return true;
end $$
"""

EXPIRED_HOLDS = """
create function pericarp.expired_holds(p_most integer)
returns table (tenant_id uuid, request_id uuid, key_id text, images integer, held_at timestamptz)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select h.tenant_id, h.request_id, h.key_id, h.images, h.held_at from pericarp.hold h
     where h.expires_at <= clock_timestamp() order by h.expires_at limit p_most
$$
"""

CLOSE_ORPHAN = """
create function pericarp.close_orphan(p_tenant uuid, p_request uuid, p_schema_version integer, p_body bytea)
returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_hold pericarp.hold;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    perform set_config('synchronous_commit', 'on', true);
    delete from pericarp.hold h
     where h.tenant_id = p_tenant and h.request_id = p_request and h.expires_at <= clock_timestamp()
    returning * into v_hold;
    if not found then
        return false;  -- settled meanwhile, or another reaper was first
    end if;
    perform pericarp.let_go(v_hold, v_hold.images);
    insert into pericarp.audit_inbox (tenant_id, request_id, orphan, schema_version, body)
    values (p_tenant, p_request, true, p_schema_version, p_body)
    on conflict (tenant_id, request_id, orphan) do nothing;
    return true;
end $$
"""

SIGNATURES = (
    "hold(uuid, text, uuid, integer, integer, integer, integer, integer, integer, integer)",
    "settle(uuid, uuid, integer, integer, bytea)",
    "release(uuid, uuid)",
    "expired_holds(integer)",
    "close_orphan(uuid, uuid, integer, bytea)",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in (HOLD, LET_GO, SETTLE, RELEASE, EXPIRED_HOLDS, CLOSE_ORPHAN):
        op.execute(statement)
    op.execute("revoke all on function pericarp.let_go(pericarp.hold, integer) from public")
    for signature in SIGNATURES:
        op.execute(f"revoke all on function pericarp.{signature} from public")
        op.execute(f"grant execute on function pericarp.{signature} to pericarp_quota")


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for signature in SIGNATURES:
        op.execute(f"drop function pericarp.{signature}")
    op.execute("drop function pericarp.let_go(pericarp.hold, integer)")
