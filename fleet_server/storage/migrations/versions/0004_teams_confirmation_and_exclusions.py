"""one word for one thing: teams, confirmation between waves, exclusions that are ended

Columns are renamed in place: SQLite would make the table anew otherwise, and dropping the old one takes along the verdicts that
refer to it. Events and audit entries of before stay as they were written down: they are history.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

RENAMED = (
    ("rollouts", "hold", "confirm"),
    ("rollouts", "together", "team"),
    ("exclusions", "lifted", "ended"),
    ("exclusions", "lifted_by", "ended_by"),
)


def upgrade() -> None:
    op.drop_index("ix_rollouts_together", "rollouts")
    for table, former, present in RENAMED:
        op.execute(f"ALTER TABLE {table} RENAME COLUMN {former} TO {present}")
    op.create_index("ix_rollouts_team", "rollouts", ["team"], unique=False)
    op.execute("UPDATE rollouts SET state = 'waiting' WHERE state = 'holding'")
