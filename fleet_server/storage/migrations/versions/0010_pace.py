"""how far a wave of a rollout has come, and when a rollout begins and who approved it"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rollouts", sa.Column("reach", sa.Integer(), nullable=True))
    for name in ("grows", "passed", "starts"):
        op.add_column("rollouts", sa.Column(name, sa.Float(), nullable=True))
    op.add_column("rollouts", sa.Column("approved_by", sa.String(length=128), nullable=True))
