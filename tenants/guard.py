"""What a runtime role and a schema must not be: checked once, before the first request is let in.

Row security is the second wall between tenants. It does not hold for superusers, for BYPASSRLS, for a table's
owner without FORCE, nor for whoever may become one of those; so the service refuses to start as such a role.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenants.errors import SchemaOutdated, UnsafeRole

if TYPE_CHECKING:
    from asyncpg import Connection, Record

ROLE_FAULTS = """
select format('role %I is a superuser', rolname) from pg_roles where rolname = session_user and rolsuper
union all
select format('role %I has BYPASSRLS', rolname) from pg_roles where rolname = session_user and rolbypassrls
union all
select format('role %I may make roles', rolname) from pg_roles where rolname = session_user and rolcreaterole
union all
select format('role %I may replicate', rolname) from pg_roles where rolname = session_user and rolreplication
union all
select format('role %I may become %I', session_user, rolname) from pg_roles
 where rolname <> session_user and (rolsuper or rolbypassrls or rolcreaterole)
   and pg_has_role(session_user, oid, 'MEMBER')
union all
select format('role %I may not set the role pericarp_quota', session_user)
 where not exists (
       select from pg_roles where rolname = 'pericarp_quota' and pg_has_role(session_user, oid, 'SET'))
union all
select format('role %I owns, or may become the owner of, %s', session_user, owned.what)
  from (select relowner as owner, format('table %s', oid::regclass) as what
          from pg_class where relnamespace = 'pericarp'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'S')
        union all
        select proowner, format('function %s', oid::regprocedure)
          from pg_proc where pronamespace = 'pericarp'::regnamespace
        union all
        select nspowner, 'the schema' from pg_namespace where nspname = 'pericarp'
        union all
        select datdba, 'the database' from pg_database where datname = current_database()) owned
 where pg_has_role(session_user, owned.owner, 'MEMBER')
"""

TABLE_FAULTS = r"""
with tables as (
    select c.oid, c.relname, c.relrowsecurity, c.relforcerowsecurity
      from pg_class c
     where c.relnamespace = 'pericarp'::regnamespace and c.relkind in ('r', 'p')
       and c.relname <> 'alembic_version'
       -- what has nothing of any tenant, and is out of the role's reach, needs no wall
       and (exists (select from pg_attribute a where a.attrelid = c.oid and a.attname = 'tenant_id')
            or has_table_privilege(session_user, c.oid, 'SELECT, INSERT, UPDATE, DELETE'))
), rules as (
    -- policies that the runtime role is subject to: those of PUBLIC and of roles that it has
    select p.polrelid, p.polcmd,
           coalesce(pg_get_expr(p.polqual, p.polrelid), '') as visible,
           coalesce(pg_get_expr(p.polwithcheck, p.polrelid), '') as writable
      from pg_policy p
     where p.polpermissive and exists (
           select from unnest(p.polroles) r(oid)
            where r.oid = 0 or pg_has_role(session_user, r.oid, 'MEMBER'))
)
select format('table %I does not enable row security', relname) from tables where not relrowsecurity
union all
select format('table %I does not force row security', relname) from tables where not relforcerowsecurity
union all
select format('table %I has no policy for reading and writing', relname) from tables t
 where not exists (select from rules r where r.polrelid = t.oid and r.polcmd = '*' and r.visible <> ''
                      and r.writable <> '')
union all
select format('table %I has a policy that does not ask for the tenant', t.relname)
  from rules r join tables t on t.oid = r.polrelid
 where (r.visible <> '' and r.visible not like '%app.tenant_id%')
    or (r.writable <> '' and r.writable not like '%app.tenant_id%')
union all
select format('table %I can be truncated by %I', relname, session_user) from tables
 where has_table_privilege(session_user, oid, 'TRUNCATE')
union all
select format('the log can be changed by %I', session_user) from tables
 where relname like 'audit\_%' and (has_table_privilege(session_user, oid, 'UPDATE, DELETE')
       or has_any_column_privilege(session_user, oid, 'UPDATE')
       or (relname <> 'audit_inbox' and has_table_privilege(session_user, oid, 'INSERT')))
union all
select format('view %I does not run with its reader''s rights', relname) from pg_class
 where relnamespace = 'pericarp'::regnamespace and relkind in ('v', 'm')
   and not coalesce(reloptions @> '{security_invoker=true}', false)
"""


async def refuse_unsafe(connection: Connection[Record]) -> None:
    """Raises `UnsafeRole` that names the faults of this connection's role and of the row security."""
    usable = "select coalesce(has_schema_privilege(to_regnamespace('pericarp'), 'USAGE'), false)"
    if not await connection.fetchval(usable):
        raise SchemaOutdated("the schema is not there yet; run `migrate`")
    faults = [row[0] for row in await connection.fetch(ROLE_FAULTS)]
    faults += [row[0] for row in await connection.fetch(TABLE_FAULTS)]
    if faults:
        raise UnsafeRole("; ".join(sorted(set(faults))[:20]))


async def refuse_outdated(connection: Connection[Record], head: str) -> None:
    """Raises `SchemaOutdated` unless the schema stands at revision `head`."""
    if await connection.fetchval("select to_regclass('pericarp.alembic_version') is null"):
        raise SchemaOutdated("the schema is not there yet; run `migrate`")
    found = await connection.fetchval("select version_num from pericarp.alembic_version")
    if found != head:
        raise SchemaOutdated(f"the schema stands at {found}, this version needs {head}; run `migrate`")
