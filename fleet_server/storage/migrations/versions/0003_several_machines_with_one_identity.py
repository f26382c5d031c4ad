"""several machines with one identity, and certificates that may be renewed late"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.add_column(sa.Column("runs", sa.JSON(), nullable=False, server_default="[]"))
        batch_op.add_column(sa.Column("shared", sa.Float(), nullable=True))
        batch_op.add_column(sa.Column("late_until", sa.Float(), nullable=True))
