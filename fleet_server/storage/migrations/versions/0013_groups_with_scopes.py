"""groups that fill themselves with the devices in a scope, and labels that enrolment tokens give"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

MAX_VERSION_CHARS = 64


def upgrade() -> None:
    op.create_table(
        "groups",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.JSON(), nullable=False),
        sa.Column("updated", sa.Float(), nullable=False),
        sa.Column("updated_by", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.add_column("devices", sa.Column("groups_by_scope", sa.JSON(), nullable=True))
    op.add_column("devices", sa.Column("stale_groups", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("devices", sa.Column("agent_version", sa.String(length=MAX_VERSION_CHARS), nullable=True))
    op.create_index("ix_devices_stale_groups", "devices", ["stale_groups", "id"], unique=False)
    op.add_column("device_groups", sa.Column("by_scope", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("enrolment_tokens", sa.Column("labels", sa.JSON(), nullable=True))
    _read_agent_versions()


def _read_agent_versions() -> None:
    """What software a device has stands in its last report."""
    said = "json_extract(state, '$.agent_version')" if op.get_bind().dialect.name == "sqlite" else "state ->> 'agent_version'"
    op.execute(sa.text(f"UPDATE devices SET agent_version = substr({said}, 1, {MAX_VERSION_CHARS})"))  # noqa: S608 - two constants
