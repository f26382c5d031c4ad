"""which CA issued a certificate"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("certificates", sa.Column("authority", sa.String(64), nullable=True))
    op.create_index("ix_certificates_authority", "certificates", ["authority", "device"])
