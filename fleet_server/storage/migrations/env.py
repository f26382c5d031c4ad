"""Alembic's entry: runs the migrations on the connection that Database.migrate hands over."""

from alembic import context

from fleet_server.storage import telemetry_models  # noqa: F401 - its tables
from fleet_server.storage.models import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True, compare_type=True
)
with context.begin_transaction():
    context.run_migrations()
