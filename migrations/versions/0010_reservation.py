"""Reservations: hold, settle, release, the closing of orphans, gateways' leases and the end of old usage.

Revision 0010, after 0009. Each function that is about one tenant binds it, so row security holds in it too. `hold`
locks the tenant's quota row: of one tenant's requests one at a time decides, and all state but a running request's
own slot is written under that lock. The time is the database's own, read after the lock, so that waiting counts.

`settle` touches its own slot's row and nothing that others wait for, because it waits for the disk: what was used is
counted by the next `hold` of the tenant, as of the moment when it was settled.

Limits go by number, for the tenant 1 to 6, for the key 7 to 12: requests, images, tokens a minute (each with a burst);
requests, tokens a calendar month (UTC); requests at the same time. NULL is no limit.
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

# GCRA as a leaky bucket (ITU-T I.371, continuous-state): the levels at a later moment, and what comes on top.
CHARGE = """
create function pericarp.charge(
    p_quota pericarp.quota, p_at_us bigint, p_requests bigint, p_images bigint, p_tokens bigint
) returns pericarp.quota
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
declare
    c_unit constant bigint := 60000000;
    v_elapsed bigint := greatest(0, p_at_us - p_quota.leaked_us);
begin
    p_quota.leaked_us := greatest(p_at_us, p_quota.leaked_us);
    -- The quotient first: the product of a long pause and a high rate would not fit.
    p_quota.requests_level := p_requests * c_unit + case
        when p_quota.requests_rate is null or v_elapsed > p_quota.requests_level / p_quota.requests_rate then 0
        else p_quota.requests_level - v_elapsed * p_quota.requests_rate end;
    p_quota.images_level := p_images * c_unit + case
        when p_quota.images_rate is null or v_elapsed > p_quota.images_level / p_quota.images_rate then 0
        else p_quota.images_level - v_elapsed * p_quota.images_rate end;
    p_quota.tokens_level := p_tokens * c_unit + case
        when p_quota.tokens_rate is null or v_elapsed > p_quota.tokens_level / p_quota.tokens_rate then 0
        else p_quota.tokens_level - v_elapsed * p_quota.tokens_rate end;
    return p_quota;
end $$
"""

# The calendar month that begins with `p_month`: counts of an earlier one are over.
TURN = """
create function pericarp.turn(p_quota pericarp.quota, p_month date, p_requests bigint, p_tokens bigint)
returns pericarp.quota
language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
begin
    if p_quota.month <> p_month then
        p_quota.month := p_month;
        p_quota.month_requests := 0;
        p_quota.month_tokens := 0;
    end if;
    p_quota.month_requests := p_quota.month_requests + p_requests;
    p_quota.month_tokens := p_quota.month_tokens + p_tokens;
    return p_quota;
end $$
"""

KEEP = """
create function pericarp.keep(p_quota pericarp.quota) returns void
language sql volatile set search_path = pg_catalog, pg_temp
as $$
    update pericarp.quota q
       set leaked_us = p_quota.leaked_us, month = p_quota.month,
           requests_level = p_quota.requests_level, requests_rate = p_quota.requests_rate,
           images_level = p_quota.images_level, images_rate = p_quota.images_rate,
           tokens_level = p_quota.tokens_level, tokens_rate = p_quota.tokens_rate,
           month_requests = p_quota.month_requests, month_tokens = p_quota.month_tokens
     where q.tenant_id = p_quota.tenant_id and q.key_id = p_quota.key_id
$$
"""

# The quota row of a tenant (key '') or of a key, locked; the first request makes it.
LOCK_QUOTA = """
create function pericarp.lock_quota(p_tenant uuid, p_key_id text) returns pericarp.quota
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_quota pericarp.quota;
begin
    select * into v_quota from pericarp.quota q
     where q.tenant_id = p_tenant and q.key_id = p_key_id for update;
    if not found then
        insert into pericarp.quota (tenant_id, key_id) values (p_tenant, p_key_id)
            on conflict (tenant_id, key_id) do nothing;
        select * into strict v_quota from pericarp.quota q
         where q.tenant_id = p_tenant and q.key_id = p_key_id for update;
    end if;
    return v_quota;
end $$
"""

# What ended since the last look goes into levels, months and usage, as of when it ended; NULL where nothing did. Under
# the tenant's lock.
COUNT_SETTLED = """
create function pericarp.count_settled(p_quota pericarp.quota, p_month date) returns pericarp.quota
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_done record;
    v_key pericarp.quota;
    v_tokens bigint;
    v_counted boolean := false;
begin
    for v_done in
        select s.n, s.key_id, s.used_images as images, s.used_tokens as tokens, s.shadowed,
               (extract(epoch from s.settled_at) * 1000000)::bigint as at_us,
               (s.settled_at at time zone 'UTC')::date as day
          from pericarp.slot s
         where s.tenant_id = p_quota.tenant_id and s.settled_at is not null order by s.settled_at
    loop
        v_counted := true;
        v_tokens := case when v_done.day >= p_month then v_done.tokens else 0 end;
        -- What a limit in shadow would have refused is not charged to it: it would not have been there.
        p_quota := pericarp.charge(p_quota, v_done.at_us, 0,
            case when 2 = any(v_done.shadowed) then 0 else v_done.images end,
            case when 3 = any(v_done.shadowed) then 0 else v_done.tokens end);
        p_quota := pericarp.turn(p_quota, p_month, 0,
            case when 5 = any(v_done.shadowed) then 0 else v_tokens end);
        -- Only a key with limits of its own has a row.
        select * into v_key from pericarp.quota q
         where q.tenant_id = p_quota.tenant_id and q.key_id = v_done.key_id;
        if found then
            perform pericarp.keep(pericarp.turn(
                pericarp.charge(v_key, v_done.at_us, 0, v_done.images, v_done.tokens),
                p_month, 0, v_tokens));
        end if;
        insert into pericarp.usage as u (tenant_id, day, key_id, requests, images, tokens, shadowed)
        values (p_quota.tenant_id, v_done.day, v_done.key_id, 1, v_done.images, v_done.tokens,
                least(1, cardinality(v_done.shadowed)))
        on conflict (tenant_id, day, key_id) do update
           set requests = u.requests + 1, images = u.images + excluded.images,
               tokens = u.tokens + excluded.tokens, shadowed = u.shadowed + excluded.shadowed;
        update pericarp.slot s set request_id = null, settled_at = null
         where s.tenant_id = p_quota.tenant_id and s.n = v_done.n;
    end loop;
    return case when v_counted then p_quota end;
end $$
"""

# `p_request` null charges nothing and only looks.
HOLD = """
create function pericarp.hold(
    p_tenant uuid, p_key_id text, p_request uuid, p_gateway uuid, p_most_ms integer,
    p_images integer, p_tokens bigint, p_limits bigint[], p_bursts bigint[], p_shadow integer[],
    out lapsed boolean, out violated integer[], out shadowed integer[], out retry_after_ms bigint,
    out held_slot integer, out held_token bigint, out held_until timestamptz,
    out remaining bigint[], out more_ms bigint[]
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    c_unit constant bigint := 60000000;
    v_keyed boolean := num_nonnulls(variadic p_limits[7:12]) > 0;
    v_top integer := case when v_keyed then 12 else 6 end;
    v_now timestamptz;
    v_now_us bigint;
    v_month date;
    v_month_left_ms bigint;
    v_tenant pericarp.quota;
    v_next pericarp.quota;
    v_key pericarp.quota;
    v_counted boolean;
    v_open record;
    v_used bigint[];
    v_cost bigint[];
    v_room bigint;
    v_unit bigint;
    v_wait_ms bigint;
    v_asks boolean := p_request is not null;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    violated := '{}';
    shadowed := '{}';
    retry_after_ms := 0;
    lapsed := false;

    v_tenant := pericarp.lock_quota(p_tenant, '');
    v_now := clock_timestamp();
    v_now_us := (extract(epoch from v_now) * 1000000)::bigint;
    v_month := date_trunc('month', v_now at time zone 'UTC')::date;
    v_month_left_ms := ceil(extract(epoch from ((v_month + interval '1 month') at time zone 'UTC') - v_now) * 1000);
    if v_asks and not exists (
        select from pericarp.gateway g where g.id = p_gateway and g.lease_until > v_now)
    then
        lapsed := true;
        return;
    end if;
    v_next := pericarp.count_settled(v_tenant, v_month);
    v_counted := not v_next is null;
    if v_counted then
        v_tenant := v_next;
    end if;
    if v_keyed then
        v_key := pericarp.turn(
            pericarp.charge(pericarp.lock_quota(p_tenant, p_key_id), v_now_us, 0, 0, 0), v_month, 0, 0);
        v_key.requests_rate := p_limits[7];
        v_key.images_rate := p_limits[8];
        v_key.tokens_rate := p_limits[9];
    end if;
    v_tenant := pericarp.turn(pericarp.charge(v_tenant, v_now_us, 0, 0, 0), v_month, 0, 0);
    v_tenant.requests_rate := p_limits[1];
    v_tenant.images_rate := p_limits[2];
    v_tenant.tokens_rate := p_limits[3];

    -- What is reserved stays reserved until its request ends, or is closed as an orphan. A slot is busy no longer
    -- once its time, or its gateway's lease, is over.
    select coalesce(sum(o.images) filter (where not 2 = any(o.shadowed)), 0) as images,
           coalesce(sum(o.tokens) filter (where not 3 = any(o.shadowed)), 0) as tokens,
           coalesce(sum(o.tokens) filter (where not 5 = any(o.shadowed)), 0) as month_tokens,
           count(*) filter (where o.busy and not 6 = any(o.shadowed)) as busy,
           coalesce(sum(o.images) filter (where o.key_id = p_key_id), 0) as key_images,
           coalesce(sum(o.tokens) filter (where o.key_id = p_key_id), 0) as key_tokens,
           count(*) filter (where o.busy and o.key_id = p_key_id) as key_busy
      into v_open
      from (select s.*, s.settled_at is null and s.expires_at > v_now and exists (
                       select from pericarp.gateway g where g.id = s.gateway_id and g.lease_until > v_now) as busy
              from pericarp.slot s where s.tenant_id = p_tenant and s.request_id is not null) o;
    v_used := array[
        v_tenant.requests_level, v_tenant.images_level + v_open.images * c_unit,
        v_tenant.tokens_level + v_open.tokens * c_unit,
        v_tenant.month_requests, v_tenant.month_tokens + v_open.month_tokens, v_open.busy,
        v_key.requests_level, v_key.images_level + v_open.key_images * c_unit,
        v_key.tokens_level + v_open.key_tokens * c_unit,
        v_key.month_requests, v_key.month_tokens + v_open.key_tokens, v_open.key_busy];
    v_cost := array[c_unit, p_images * c_unit, p_tokens * c_unit, 1, p_tokens, 1];
    v_cost := v_cost || v_cost;

    if v_asks then
        -- The same request again, because the first answer was lost: what it holds already, and no second charge.
        select s.n, s.token, s.expires_at, s.shadowed into held_slot, held_token, held_until, shadowed
          from pericarp.slot s
         where s.tenant_id = p_tenant and s.request_id = p_request and s.settled_at is null;
        v_asks := not found;
        shadowed := coalesce(shadowed, '{}');
    end if;
    if v_asks then
        for i in 1..v_top loop
            v_room := coalesce(p_bursts[i] * c_unit, p_limits[i]);
            if v_cost[i] > 0 and v_used[i] + v_cost[i] > v_room then
                if i = any(p_shadow) then
                    shadowed := shadowed || i;
                    continue;
                end if;
                violated := violated || i;
                v_wait_ms := case (i - 1) % 6 + 1
                    when 4 then v_month_left_ms when 5 then v_month_left_ms when 6 then 1000
                    else ceil((v_used[i] + v_cost[i] - v_room) / (1000.0 * p_limits[i])) end;
                retry_after_ms := greatest(retry_after_ms, v_wait_ms);
            end if;
        end loop;
    end if;

    if v_asks and cardinality(violated) = 0 then
        for i in 1..v_top loop
            if not i = any(shadowed) then
                v_used[i] := v_used[i] + v_cost[i];
            end if;
        end loop;
        v_tenant.requests_level := v_used[1];
        v_tenant.month_requests := v_used[4];
        held_until := v_now + interval '1 millisecond' * p_most_ms;
        update pericarp.slot s
           set token = s.token + 1, request_id = p_request, key_id = p_key_id, gateway_id = p_gateway,
               images = p_images, tokens = p_tokens, shadowed = hold.shadowed, expires_at = held_until
         where s.tenant_id = p_tenant and s.n = (
               select min(f.n) from pericarp.slot f where f.tenant_id = p_tenant and f.request_id is null)
        returning s.n, s.token into held_slot, held_token;
        if not found then
            insert into pericarp.slot (tenant_id, n, token, request_id, key_id, gateway_id,
                                       images, tokens, shadowed, expires_at)
            values (p_tenant,
                    (select coalesce(max(t.n), 0) + 1 from pericarp.slot t where t.tenant_id = p_tenant),
                    1, p_request, p_key_id, p_gateway, p_images, p_tokens, shadowed, held_until)
            returning n, token into held_slot, held_token;
        end if;
    elsif v_asks then
        insert into pericarp.usage as u (tenant_id, day, key_id, refused)
        values (p_tenant, (v_now at time zone 'UTC')::date, p_key_id, 1)
        on conflict (tenant_id, day, key_id) do update set refused = u.refused + 1;
    end if;
    if v_counted or (v_asks and cardinality(violated) = 0) then
        perform pericarp.keep(v_tenant);
        if v_keyed then
            v_key.requests_level := v_used[7];
            v_key.month_requests := v_used[10];
            perform pericarp.keep(v_key);
        end if;
    end if;

    for i in 1..v_top loop
        continue when p_limits[i] is null;
        v_unit := case when p_bursts[i] is null then 1 else c_unit end;
        v_room := coalesce(p_bursts[i], p_limits[i]) * v_unit;
        remaining[i] := greatest(0, (v_room - v_used[i]) / v_unit);
        more_ms[i] := case
            when v_used[i] <= 0 or i % 6 = 0 then 0
            when v_unit = 1 then v_month_left_ms
            else ceil(((remaining[i] + 1) * c_unit - (v_room - v_used[i])) / (1000.0 * p_limits[i])) end;
    end loop;
end $$
"""

SETTLE = """
create function pericarp.settle(
    p_tenant uuid, p_request uuid, p_slot integer, p_token bigint, p_images integer, p_tokens bigint,
    p_schema_version integer, p_body bytea
) returns uuid
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    perform pericarp.let_go(p_tenant, p_request, p_slot, p_token, p_images, p_tokens);
    return pericarp.append_entry(p_tenant, p_request, p_schema_version, p_body);
end $$
"""

# Once, and for the request that has the slot: else nothing happens. Never more is used, nor less than nothing given
# back, than was reserved.
LET_GO = """
create function pericarp.let_go(
    p_tenant uuid, p_request uuid, p_slot integer, p_token bigint, p_images integer, p_tokens bigint
) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
    update pericarp.slot s
       set settled_at = clock_timestamp(), expires_at = '-infinity',
           used_images = least(s.images, greatest(0, p_images)), used_tokens = least(s.tokens, greatest(0, p_tokens))
     where s.tenant_id = p_tenant and s.n = p_slot and s.token = p_token and s.request_id = p_request
       and s.settled_at is null;
    return found;
end $$
"""

RELEASE = """
create function pericarp.release(p_tenant uuid, p_request uuid, p_slot integer, p_token bigint) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    return pericarp.let_go(p_tenant, p_request, p_slot, p_token, 0, 0);
end $$
"""

EXPIRED_HOLDS = """
create function pericarp.expired_holds(p_most integer)
returns table (tenant_id uuid, request_id uuid, key_id text, slot integer, token bigint, images integer)
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    select s.tenant_id, s.request_id, s.key_id, s.n, s.token, s.images from pericarp.slot s
     where s.request_id is not null and s.settled_at is null and (s.expires_at <= clock_timestamp() or not exists (
           select from pericarp.gateway g where g.id = s.gateway_id and g.lease_until > clock_timestamp()))
     limit p_most
$$
"""

CLOSE_ORPHAN = """
create function pericarp.close_orphan(
    p_tenant uuid, p_request uuid, p_slot integer, p_token bigint, p_schema_version integer, p_body bytea
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    perform set_config('synchronous_commit', 'on', true);
    -- Whether work was done is not known: all that was reserved counts as used.
    update pericarp.slot s
       set settled_at = clock_timestamp(), expires_at = '-infinity', used_images = s.images, used_tokens = s.tokens
     where s.tenant_id = p_tenant and s.n = p_slot and s.token = p_token and s.request_id = p_request
       and s.settled_at is null and (s.expires_at <= clock_timestamp() or not exists (
           select from pericarp.gateway g where g.id = s.gateway_id and g.lease_until > clock_timestamp()));
    if not found then
        return false;  -- settled meanwhile, or another reaper was first
    end if;
    insert into pericarp.audit_inbox (tenant_id, request_id, orphan, schema_version, body)
    values (p_tenant, p_request, true, p_schema_version, p_body)
    on conflict (tenant_id, request_id, orphan) do nothing;
    return true;
end $$
"""

# False where the lease ran out before: others may have what it held, so it is not to be taken up again.
EXTEND_LEASE = """
create function pericarp.extend_lease(p_gateway uuid, p_lease_ms integer) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    insert into pericarp.gateway as g (id, lease_until)
    values (p_gateway, clock_timestamp() + interval '1 millisecond' * p_lease_ms)
    on conflict (id) do update set lease_until = excluded.lease_until where g.lease_until > clock_timestamp();
    if not found then
        return false;
    end if;
    delete from pericarp.gateway g where g.lease_until < clock_timestamp() - interval '1 hour';
    return true;
end $$
"""

# A policy's `retention_days` counts for its usage as well.
FORGET_USAGE = """
create function pericarp.forget_usage(p_default_days integer, p_most integer) returns bigint
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    with gone as (
        delete from pericarp.usage u
         where (u.tenant_id, u.day, u.key_id) in (
               select o.tenant_id, o.day, o.key_id from pericarp.usage o
                where o.day < current_date - coalesce((
                      select (p.body ->> 'retention_days')::integer from pericarp.policy p
                       where p.tenant_id = o.tenant_id order by p.version desc limit 1), p_default_days)
                limit p_most)
        returning 1)
    select count(*) from gone
$$
"""

CALLED = (
    "hold(uuid, text, uuid, uuid, integer, integer, bigint, bigint[], bigint[], integer[])",
    "settle(uuid, uuid, integer, bigint, integer, bigint, integer, bytea)",
    "release(uuid, uuid, integer, bigint)",
    "expired_holds(integer)",
    "close_orphan(uuid, uuid, integer, bigint, integer, bytea)",
    "extend_lease(uuid, integer)",
    "forget_usage(integer, integer)",
)
INNER = (
    "charge(pericarp.quota, bigint, bigint, bigint, bigint)",
    "turn(pericarp.quota, date, bigint, bigint)",
    "keep(pericarp.quota)",
    "lock_quota(uuid, text)",
    "count_settled(pericarp.quota, date)",
    "let_go(uuid, uuid, integer, bigint, integer, bigint)",
)


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for statement in (
        *(CHARGE, TURN, KEEP, LOCK_QUOTA, COUNT_SETTLED, HOLD, LET_GO, SETTLE, RELEASE),
        *(EXPIRED_HOLDS, CLOSE_ORPHAN, EXTEND_LEASE, FORGET_USAGE),
    ):
        op.execute(statement)
    for signature in (*CALLED, *INNER):
        op.execute(f"revoke all on function pericarp.{signature} from public")
    for signature in CALLED:
        op.execute(f"grant execute on function pericarp.{signature} to pericarp_quota")


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    for signature in (*CALLED, *INNER):
        op.execute(f"drop function pericarp.{signature}")
