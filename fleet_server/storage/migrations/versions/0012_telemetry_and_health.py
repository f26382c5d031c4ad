"""what devices tell about how their models do, and what rollouts take from it"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "device_telemetry",
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("counter", sa.BigInteger(), nullable=False),
        sa.Column("received", sa.Float(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("device"),
    )
    op.create_table(
        "device_figures",
        *_of_a_release(),
        sa.Column("length_s", sa.Integer(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("figures", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("device", "model", "release", "length_s", "start"),
    )
    op.create_index("ix_device_figures_age", "device_figures", ["length_s", "start"])
    op.create_table(
        "device_pasts",
        *_of_a_release(),
        sa.Column("counter", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("past", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("device", "model", "release"),
    )
    op.create_index("ix_device_pasts_at", "device_pasts", ["at"])
    op.create_table(
        "health_samples",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("rollout", sa.String(length=64), nullable=False),
        sa.Column("change", sa.BigInteger(), nullable=False),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("test", sa.String(length=16), nullable=False),
        *(sa.Column(name, sa.Float(), nullable=False) for name in ("at", "before", "now")),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in ("of_before", "of_now")),
        sa.ForeignKeyConstraint(["rollout"], ["rollouts.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_index("ix_health_samples_change", "health_samples", ["rollout", "change", "seq"])
    op.create_index("ix_health_samples_device", "health_samples", ["rollout", "device", "test"], unique=True)
    op.add_column("rollouts", sa.Column("health", sa.JSON(), nullable=True))
    op.add_column("verdicts", sa.Column("health", sa.JSON(), nullable=True))


def _of_a_release() -> tuple[sa.Column[str], sa.Column[str], sa.Column[int]]:
    return (
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("release", sa.BigInteger(), nullable=False),
    )
