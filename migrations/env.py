"""Alembic's environment. `tenants.database.migrate` hands in a connection and owns the transaction."""

from __future__ import annotations

from alembic import context

from tenants.tables import SCHEMA, metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("alembic runs through `python -m service migrate`, which knows the owner's URL")

context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table_schema=SCHEMA,
    include_schemas=True,
    transaction_per_migration=False,
)
context.run_migrations()
