"""${message}.

Revision ${up_revision}, after ${down_revision | comma,n}. One noun per revision. A table with tenant_id enables and FORCEs row
security, carries an `own_rows` policy with USING and WITH CHECK, and leads its unique constraints with tenant_id.
"""

from __future__ import annotations

from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    op.execute("set local lock_timeout = '5s'")
    ${downgrades if downgrades else "pass"}
