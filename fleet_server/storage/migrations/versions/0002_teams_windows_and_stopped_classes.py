"""rollouts that go together, their windows, and releases that are stopped for a hardware class"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("rollouts", schema=None) as batch_op:
        batch_op.add_column(sa.Column("together", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("window", sa.String(length=64), nullable=True))
        batch_op.create_index(batch_op.f("ix_rollouts_together"), ["together"], unique=False)
    op.create_table(
        "exclusions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("release", sa.BigInteger(), nullable=False),
        sa.Column("hardware", sa.String(length=512), nullable=False),
        sa.Column("instead", sa.BigInteger(), nullable=True),
        sa.Column("rollout", sa.String(length=64), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("devices", sa.JSON(), nullable=False),
        sa.Column("lifted", sa.Float(), nullable=True),
        sa.Column("lifted_by", sa.String(length=128), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("exclusions", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_exclusions_model"), ["model"], unique=False)
