"""which CA issued a certificate"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("certificates", sa.Column("authority", sa.String(64), nullable=True))
    op.create_index("ix_certificates_authority", "certificates", ["authority", "device"])
