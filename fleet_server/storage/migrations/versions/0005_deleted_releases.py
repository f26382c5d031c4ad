"""releases whose files were deleted"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("releases", sa.Column("deleted", sa.Boolean(), nullable=False, server_default=sa.false()))
