"""A database made ready for us: the three roles, the empty database, its schema. Needs a superuser, once."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from dataclasses import dataclass, field

from sqlalchemy import make_url

from tenants.database import CONNECT_S, QUOTA_ROLE, connect, translated
from tenants.tables import SCHEMA

OWNER_ROLE = "pericarp_owner"
APP_ROLE = "pericarp_app"
PROVISION_LOCK = 0x70726302  # advisory locks: "prc", 2; 1 is in database.py
SCRAM_ITERATIONS = 4096


@dataclass(frozen=True, slots=True)
class Urls:
    """How the two login roles reach the database."""

    owner_url: str = field(repr=False)
    app_url: str = field(repr=False)


async def provision(
    superuser_url: str, *, owner_password: str, app_password: str, database: str = "pericarp"
) -> Urls:
    """Make the roles and the empty database, or bring them into the state that this version wants.

    Idempotent, and safe when two do it at once. Passwords leave as SCRAM verifiers: no server log can show
    them.
    """
    url = make_url(superuser_url)
    with translated():
        connection = await connect(superuser_url, {}, command_timeout=60)
        try:
            await connection.execute("select pg_advisory_lock($1)", PROVISION_LOCK)
            for role, login in (
                (OWNER_ROLE, f"login password '{scram_verifier(owner_password)}'"),
                (APP_ROLE, f"login password '{scram_verifier(app_password)}'"),
                (QUOTA_ROLE, "nologin"),
            ):
                if not await connection.fetchval(
                    "select exists (select from pg_roles where rolname = $1)", role
                ):
                    await connection.execute(f"create role {role}")
                await connection.execute(
                    f"alter role {role} with {login} nosuperuser nobypassrls nocreatedb nocreaterole "
                    "noreplication"
                )
            # SET without INHERIT: only a connection that sets the role may admit.
            await connection.execute(
                f"grant {QUOTA_ROLE} to {APP_ROLE} with inherit false, set true, admin false"
            )
            name = await connection.fetchval("select quote_ident($1)", database)
            if not await connection.fetchval(
                "select exists (select from pg_database where datname = $1)", database
            ):
                await connection.execute(
                    f"create database {name} owner {OWNER_ROLE} encoding 'UTF8' template template0"
                )
            await connection.execute(f"alter database {name} owner to {OWNER_ROLE}")
            await connection.execute(f"revoke all on database {name} from public")
            await connection.execute(f"grant connect on database {name} to {APP_ROLE}")
            inside_url = url.set(database=database).render_as_string(hide_password=False)
            inside = await connect(inside_url, {}, command_timeout=60)
            try:
                await inside.execute(f"create schema if not exists {SCHEMA} authorization {OWNER_ROLE}")
                await inside.execute("revoke all on schema public from public")
            finally:
                await inside.close(timeout=CONNECT_S)
        finally:
            await connection.close(timeout=CONNECT_S)
    owner_url, app_url = (
        url.set(username=role, password=password, database=database).render_as_string(hide_password=False)
        for role, password in ((OWNER_ROLE, owner_password), (APP_ROLE, app_password))
    )
    return Urls(owner_url, app_url)


def scram_verifier(password: str) -> str:
    """What Postgres stores of a password (RFC 5803). Printable ASCII only: SASLprep changes nothing there."""
    if not password.isascii() or not password.isprintable():
        raise ValueError("a database password must be printable ASCII")
    salt = os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, SCRAM_ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    salt_64, stored_64, server_64 = (base64.b64encode(part).decode() for part in (salt, stored, server))
    return f"SCRAM-SHA-256${SCRAM_ITERATIONS}:{salt_64}${stored_64}:{server_64}"
