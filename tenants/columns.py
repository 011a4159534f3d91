"""What all tables of the schema share: its name, its metadata, and columns that mean the same everywhere."""

from __future__ import annotations

from sqlalchemy import Column, MetaData, text
from sqlalchemy.dialects.postgresql import TIMESTAMP

SCHEMA = "pericarp"
metadata = MetaData(schema=SCHEMA)

NOW = text("clock_timestamp()")


def time(name: str, *, nullable: bool = False, default: bool = False) -> Column[object]:
    """A moment; `default`: the one of the insertion."""
    return Column(name, TIMESTAMP(timezone=True), nullable=nullable, server_default=NOW if default else None)
