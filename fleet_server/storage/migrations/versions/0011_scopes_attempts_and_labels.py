"""attempts at a release, the rollouts that another one superseded, scopes of rollouts and rules, and labels of devices to search by"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rollouts", sa.Column("attempt", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("rollouts", sa.Column("kept", sa.JSON(), nullable=True))
    op.add_column("devices", sa.Column("retries", sa.JSON(), nullable=True))
    op.add_column("rollouts", sa.Column("scope", sa.Text(), nullable=False, server_default=""))
    op.create_table(
        "rules",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("release", sa.BigInteger(), nullable=True),
        sa.Column("previous", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("model", "scope", name="uq_rules_scope"),
    )
    op.create_table(
        "device_labels",
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("value", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("device", "name"),
    )
    op.create_index("ix_device_labels_name", "device_labels", ["name", "value", "device"], unique=False)
