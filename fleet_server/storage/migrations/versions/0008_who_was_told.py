"""which devices of a rollout were told and which were skipped, what its waves must keep, and who holds a model"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rollouts", sa.Column("rules", sa.JSON(), nullable=True))
    op.add_column("device_models", sa.Column("held", sa.Boolean(), nullable=False, server_default=sa.false()))
    _of_devices("told_devices")
    _of_devices("skipped_devices", sa.Column("by", sa.String(length=128), nullable=False))


def _of_devices(name: str, *more: sa.Column[str]) -> None:
    op.create_table(
        name,
        sa.Column("rollout", sa.String(length=64), nullable=False),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        *more,
        sa.ForeignKeyConstraint(["rollout"], ["rollouts.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("rollout", "device"),
    )
